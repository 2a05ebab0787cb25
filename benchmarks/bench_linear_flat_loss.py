"""Benchmarks of linear_flat_loss; its cases are in `unlearn_fast/benchmarking/cases.py`."""

from collections.abc import Callable


def test_linear_flat_loss(run_case: Callable[[], None]) -> None:
    run_case()
