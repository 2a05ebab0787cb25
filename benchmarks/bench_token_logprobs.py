"""Benchmarks of token_logprobs; its cases are in `unlearn_fast/benchmarking/tokens.py`."""

from collections.abc import Callable


def test_token_logprobs(run_case: Callable[[], None]) -> None:
    run_case()
