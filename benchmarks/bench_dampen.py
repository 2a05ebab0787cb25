"""Benchmarks of dampen_; its cases are in `unlearn_fast/benchmarking/cases.py`."""

from collections.abc import Callable


def test_dampen_(run_case: Callable[[], None]) -> None:
    run_case()
