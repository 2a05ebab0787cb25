"""The benchmarks' own machinery: cases are well formed, wrong results are seen, memory is measured."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from unlearn_fast.benchmarking import cases, dampening, fisher, fisher_rivals, measure, memory, report
from unlearn_fast.benchmarking.case import Case, Cost, Verdict, error, make_inputs


def test_names_are_unique() -> None:
    names = [case.name for case in cases.smallest() + cases.full()]
    assert len(set(names)) == len(names)
    assert [cases.find(name).name for name in names] == names


def test_every_operator_of_a_gpu_can_be_chosen() -> None:
    chosen = cases.on("cuda")
    assert len({case.name for case in chosen}) == len(chosen)
    assert {case.operator for case in chosen} <= set(cases.operators())
    assert all(case.device == "cuda" for case in chosen)


def test_memory_is_that_of_the_same_implementations() -> None:
    for case in cases.full():
        for weighed in case.weighed():
            assert cases.find(weighed.name).entrants()[0].name == case.entrants()[0].name
            assert {e.name for e in weighed.entrants()} == {e.name for e in case.entrants()}


def test_every_operator_has_a_smallest_case() -> None:
    assert {case.operator for case in cases.smallest()} == set(cases.operators())


@pytest.mark.parametrize("case", cases.smallest(), ids=lambda case: case.name)
def test_inputs_are_fresh_and_random(case: Case) -> None:
    inputs, again = make_inputs(case), make_inputs(case)
    fresh = case.fresh(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[name])
            assert value.unique().numel() > 1
            assert (fresh[name] is not value) == (name in case.overwritten)


@pytest.mark.parametrize(
    ("result", "expected"),
    [([1.0, 2.0, 3.0], 0.0), ([1.0, 2.0, 3.3], 0.1), ([1.2, 2.0, 3.0], 0.1), ([1.0, 2.0], float("inf"))],
)
def test_error(result: list[float], expected: float) -> None:
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert error((torch.tensor(result),), (exact,)) == pytest.approx(expected, abs=1e-6)


def test_error_of_nan_and_of_missing_results_is_infinite() -> None:
    ones = torch.ones(2)
    assert error((ones, torch.tensor([float("nan"), 1.0])), (ones, ones)) == float("inf")
    assert error((torch.tensor([1.0, float("inf")]),), (ones,)) == float("inf")
    assert error((ones,), (ones, ones)) == float("inf")


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


def test_spread_is_that_of_the_middle_half() -> None:
    seconds = [4.0, 1.0, 3.0, 2.0, 100.0]
    assert measure.spread(seconds) == (4 - 2) / 3
    assert measure.spread([1.0, 1.0]) == 0
    assert measure.spread([1.0]) is None and measure.Timing("", "ours").spread is None


def test_ceiling_scales_with_the_cost() -> None:
    copy = replace(dampening.dampen(1000, share=0.5), rivals={}, cost=Cost("", bytes=80_000))
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
    loop, einsum, ours = (
        memory.peak_bytes(partial(cases.find, case.name), name) for name in ("reference", "einsum", "ours")
    )
    assert loop is not None and einsum is not None and ours is not None
    assert 1.5 * O_I < loop < 8 * O_I <= einsum < 32 * O_I
    assert ours < O_I


def small_fisher_case() -> fisher.FisherCase:
    return next(c for c in fisher.smallest() if isinstance(c, fisher.FisherCase) and c.model.name.startswith("MLP"))


def test_fisher_results_are_judged_parameter_by_parameter() -> None:
    case = small_fisher_case()
    ours, library = case.entrants()[0], next(e for e in case.entrants() if e.kind == "library")
    exact = ours.exact(make_inputs(case))
    assert case.verdict(ours, exact, exact) == Verdict(0.0, "")

    first = exact[0]
    assert first is not None
    slightly_wrong = (first * (1 + 2e-5), *exact[1:])
    verdict = case.verdict(library, slightly_wrong, exact)
    assert verdict.error == pytest.approx(2e-5) and verdict.failure == "wrong in 35.0% of the parameters: 0.weight"
    nan = (first * float("nan"), *exact[1:])
    assert case.verdict(ours, nan, exact).failure.startswith("wrong in 35.0%")
    assert case.verdict(ours, exact[1:], exact).failure == "gives 5 results for 6 parameters"

    without_biases = tuple(r if i % 2 == 0 else None for i, r in enumerate(exact))
    assert case.verdict(ours, without_biases, exact).failure == "incomplete"
    verdict = case.verdict(library, without_biases, exact)
    assert not verdict.failure and verdict.note == "without Linear.bias"
    assert verdict.missing == pytest.approx(36 / 548)
    assert case.verdict(library, (None,) * 6, exact).failure == "incomplete"


def test_fisher_rivals_agree_with_single_examples() -> None:
    """Ours, the loop and torch.func on every model; the other libraries may be missing, or wrong."""
    for case in fisher.smallest():
        inputs = make_inputs(case)
        for entrant in case.entrants():
            if entrant.kind != "library":
                verdict = case.verdict(entrant, entrant.run(inputs), entrant.exact(inputs))
                assert not verdict.failure, f"{case.name}, {entrant.name}: {verdict}"


def test_a_missing_library_is_a_row_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_rivals.importlib.util, "find_spec", lambda name, *_: None)
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: 3 << 20)
    outcome = measure.measure(small_fisher_case(), cold=False)
    missing = [timing for timing in outcome.timings if timing.kind == "library"]
    assert missing and all("pip install 'unlearn_fast[rivals]'" in timing.failure for timing in missing)
    assert not outcome.failed
    printed = report.text(outcome)
    assert printed.count("is not installed") == len(missing) and outcome.case.name in printed


def test_time_is_in_units_of_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further batch costs the difference of twice the batches and the batches, round by round."""
    case = small_fisher_case()
    ours, further = case.entrants()[:2]
    taken = {ours.name: [5.0, 6.0], further.name: [8.0, 10.0, 100.0], case.baseline: [2.0], "ceiling": [0.5]}
    monkeypatch.setattr(measure, "_take_turns", lambda *_: taken | {"released form (another quantity)": [1.0]})
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: None)
    outcome = measure.measure(replace(case, rivals={}), cold=False)
    times = {timing.name: timing for timing in outcome.timings}
    assert times[ours.name].seconds == [2.5, 3.0] and times[further.name].seconds == [1.5, 2.0]  # of 2 batches
    assert outcome.baseline is times[case.baseline]
    assert outcome.over_baseline(times[further.name]) == 1.75


def test_what_has_had_its_time_sits_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BUDGET", dict.fromkeys(measure.BUDGET, 0.0))
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: None)
    case = cases.sum_grad_squared_linear(2, 4, 3, 5)
    outcome = measure.measure(replace(case, rivals={}, yardsticks={}), cold=False)
    assert [len(timing.seconds) for timing in outcome.timings] == [1]
