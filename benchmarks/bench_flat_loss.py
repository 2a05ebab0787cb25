"""Benchmarks of flat_loss; its cases are in `unlearn_fast/benchmarking/tokens.py`."""

from collections.abc import Callable


def test_flat_loss(run_case: Callable[[], None]) -> None:
    run_case()
