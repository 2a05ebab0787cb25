"""Benchmarks of cross_entropy; its cases are in `unlearn_fast/benchmarking/tokens.py`."""

from collections.abc import Callable


def test_cross_entropy(run_case: Callable[[], None]) -> None:
    run_case()
