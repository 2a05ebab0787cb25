"""Benchmarks of sum_grad_squared_conv_; its cases are in `unlearn_fast/benchmarking/cases.py`."""

from collections.abc import Callable


def test_sum_grad_squared_conv_(run_case: Callable[[], None]) -> None:
    run_case()
