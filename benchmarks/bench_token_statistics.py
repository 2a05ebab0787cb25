"""Benchmarks of token_statistics; its cases are in `unlearn_fast/benchmarking/tokens.py`."""

from collections.abc import Callable


def test_token_statistics(run_case: Callable[[], None]) -> None:
    run_case()
