"""Benchmarks of diagonal_fisher; its cases are in `unlearn_fast/benchmarking/cases.py`."""

from collections.abc import Callable


def test_diagonal_fisher(run_case: Callable[[], None]) -> None:
    run_case()
