"""Benchmarks of linear_cross_entropy; its cases are in `unlearn_fast/benchmarking/cases.py`."""

from collections.abc import Callable


def test_linear_cross_entropy(run_case: Callable[[], None]) -> None:
    run_case()
