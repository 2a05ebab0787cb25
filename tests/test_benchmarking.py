"""The benchmarks' own machinery: cases are well formed, wrong results are seen, memory is measured."""

import sys
from dataclasses import replace

import pytest
import torch

from unlearn_fast.benchmarking import cases, measure, memory
from unlearn_fast.benchmarking.case import Case, Cost


def test_names_are_unique() -> None:
    names = [case.name for case in cases.smallest() + cases.full()]
    assert len(set(names)) == len(names)
    assert [cases.find(name).name for name in names] == names


def test_every_operator_has_a_smallest_case() -> None:
    assert {case.operator for case in cases.smallest()} == set(cases.operators())


@pytest.mark.parametrize("case", cases.smallest(), ids=lambda case: case.name)
def test_inputs_are_fresh_and_random(case: Case) -> None:
    inputs, again = measure.make_inputs(case), measure.make_inputs(case)
    fresh = case.fresh(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[name])
            assert value.unique().numel() > 1
            assert (fresh[name] is not value) == (name in case.overwritten)


@pytest.mark.parametrize(
    ("result", "error"),
    [([1.0, 2.0, 3.0], 0.0), ([1.0, 2.0, 3.3], 0.1), ([1.2, 2.0, 3.0], 0.1), ([1.0, 2.0], float("inf"))],
)
def test_error(result: list[float], error: float) -> None:
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert measure.error((torch.tensor(result),), (exact,)) == pytest.approx(error, abs=1e-6)


def test_error_of_nan_and_of_missing_results_is_infinite() -> None:
    ones = torch.ones(2)
    assert measure.error((ones, torch.tensor([float("nan"), 1.0])), (ones, ones)) == float("inf")
    assert measure.error((torch.tensor([1.0, float("inf")]),), (ones,)) == float("inf")
    assert measure.error((ones,), (ones, ones)) == float("inf")


def test_a_wrong_result_and_a_failure_are_not_timed() -> None:
    case = replace(
        cases.sum_grad_squared_linear(2, 4, 3, 5),
        rivals={"does nothing": lambda x: (x["out"],), "raises": lambda x: (x["no such input"],)},
    )
    outcome = measure.measure(case, cold=False)
    timings = {timing.name: timing for timing in outcome.timings}
    assert timings["does nothing"].wrong and timings["does nothing"].median is None
    assert timings["raises"].failure.startswith("KeyError") and timings["raises"].median is None
    assert timings["ours"].median and outcome.ratio(timings["ours"]) == 1
    assert outcome.failed


def test_ceiling_scales_with_the_cost() -> None:
    copy = replace(cases.dampen(1000, share=0.5), rivals={}, cost=Cost("", bytes=80_000))
    outcome = measure.measure(copy, cold=False)
    assert outcome.ceiling == pytest.approx(80_000 / outcome.rate)
    product = replace(copy, cost=Cost("", flops=10**9))
    outcome = measure.measure(product, cold=False)
    assert outcome.ceiling == pytest.approx(1e9 / outcome.rate)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_temporary_tensors() -> None:
    """The loop over examples makes one [O, I] product and its square; ours must not make [B, O, I].

    The system counts pages in batches, to within some 100 KiB.
    """
    case = next(case for case in cases.full() if case.operator == "sum_grad_squared_linear_")
    O_I = 1536 * 512 * 4  # bytes
    loop, einsum = memory.peak_bytes(case.name, "reference"), memory.peak_bytes(case.name, "einsum")
    ours = memory.peak_bytes(case.name, "ours")
    assert loop is not None and einsum is not None and ours is not None
    assert 1.5 * O_I < loop < 8 * O_I <= einsum < 32 * O_I
    assert ours < O_I
