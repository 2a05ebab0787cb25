"""Benchmarks of token_kl; its cases are in `unlearn_fast/benchmarking/tokens.py`."""

from collections.abc import Callable


def test_token_kl(run_case: Callable[[], None]) -> None:
    run_case()
