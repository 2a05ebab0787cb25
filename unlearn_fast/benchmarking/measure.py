"""Times a case: its implementations take turns in one process, each first shown to be right on the timed inputs."""

import gc
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from operator import attrgetter

import torch

from unlearn_fast.benchmarking import cases
from unlearn_fast.benchmarking import clock as clocks
from unlearn_fast.benchmarking.case import Case, Entrant, Inputs, Results, Run, make_inputs, release
from unlearn_fast.benchmarking.clock import Clock

ROUNDS, WARM_UP = 9, 1  # the check has run and compiled each implementation once already
# Seconds of an implementation after which it sits out the rounds left, once it has been in one.
BUDGET = {"ours": 60.0, "yardstick": 60.0, "rival": 20.0, "library": 20.0}


@dataclass
class Timing:
    """One implementation in one case."""

    name: str
    kind: str  # "ours", "rival", "library" or "yardstick"
    error: float | None = None  # largest error of the results on the timed inputs, see `Case.verdict`
    missing: float = 0.0  # share of the values that it does not give
    seconds: list[float] = field(default_factory=list)  # one a round
    peaks: list[int | None] = field(default_factory=list)  # memory beyond the inputs, one for each of `Case.weighed`
    failure: str = ""  # why it was not timed
    wrong: bool = False  # because its results were wrong
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """The rounds' interquartile range over their median; None for a single round."""
        return spread(self.seconds)

    @property
    def peak_bytes(self) -> int | None:
        """Memory beyond the inputs; None where the system does not tell."""
        return self.peaks[0] if self.peaks else None


def spread(seconds: Sequence[float]) -> float | None:
    if len(seconds) < 2:
        return None
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / median


@dataclass
class Outcome:
    """One case, timed."""

    case: Case
    timings: list[Timing]  # ours first
    ceiling: float  # seconds that a copy, or a matrix product, of the case's cost takes here
    rate: float  # of that copy or product: bytes or FLOPs a second
    rate_spread: float | None = None  # of its rounds, as `Timing.spread`

    @property
    def failed(self) -> bool:
        """Whether ours could not be timed, or any result but another library's was wrong."""
        return bool(self.timings[0].failure) or any(t.wrong and t.kind != "library" for t in self.timings)

    @property
    def baseline(self) -> Timing:
        """Whose time is the unit of the report."""
        return next((timing for timing in self.timings if timing.name == self.case.baseline), self.timings[0])

    def ratio(self, timing: Timing) -> float | None:
        """Its time over ours."""
        return _ratio(timing, self.timings[0])

    def over_baseline(self, timing: Timing) -> float | None:
        """Its time over the baseline's."""
        return _ratio(timing, self.baseline)

    def share(self, timing: Timing) -> float | None:
        """Of the ceiling. The cost is that of the operator, so a yardstick has none."""
        return self.ceiling / timing.median if timing.median and timing.kind != "yardstick" else None


def _ratio(timing: Timing, unit: Timing) -> float | None:
    return timing.median / unit.median if timing.median and unit.median else None


def measure(case: Case, *, cold: bool = True) -> Outcome:
    """Checks, times and weighs every implementation of a case; with `cold`, the caches are emptied before each run."""
    torch.compiler.reset()  # each case has its own shapes, and torch compiles a function for a few of them only
    release()
    inputs = make_inputs(case)
    timings: dict[str, Timing] = {}
    right: dict[str, Entrant] = {}
    for exact, group in groupby(case.entrants(), key=attrgetter("exact")):  # so that one truth is in memory at a time
        truth = cache(partial(_truth, case, exact, inputs))
        for entrant in group:
            timing = timings[entrant.name] = _checked(case, entrant, inputs, truth)
            if not timing.failure:
                right[entrant.name] = entrant
        del truth
    release()
    clock = clocks.of(case)
    work, ceiling = clock.ceiling(case.counted(), case.dtype)
    runs = {name: (entrant.run, clock.patience * BUDGET[entrant.kind]) for name, entrant in right.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check has heard them
        seconds = _take_turns(case, inputs, runs | {"ceiling": (ceiling, BUDGET["ours"])}, clock, cold)
    del inputs  # a case is weighed with inputs of its own
    for name, entrant in right.items():
        less = seconds.get(entrant.less, [0.0] * ROUNDS)
        timings[name].seconds = [(own - other) / entrant.units for own, other in zip(seconds[name], less, strict=False)]
        if not entrant.less:
            timings[name].peaks = [clock.peak_bytes(weighed, name, cases.find) for weighed in case.weighed()]
    rate, cost = work / statistics.median(seconds["ceiling"]), case.counted()
    return Outcome(case, list(timings.values()), (cost.flops or cost.bytes) / rate, rate, spread(seconds["ceiling"]))


def _truth(case: Case, exact: Run, inputs: Inputs) -> Results:
    return exact(case.fresh(inputs))


def _checked(case: Case, entrant: Entrant, inputs: Inputs, truth: Callable[[], Results]) -> Timing:
    """What one run tells of an implementation, before it is timed."""
    timing = Timing(entrant.name, entrant.kind)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = entrant.run(case.fresh(inputs))
        told = entrant.kind == "ours" and not entrant.less
        timing.note = "; ".join(str(w.message) for w in caught) if told else ""
        verdict = case.verdict(entrant, results, truth())
    except Exception as failure:  # a rival that cannot run here (no compiler, say) is part of the outcome
        timing.failure = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        return timing
    timing.error, timing.failure, timing.missing = verdict.error, verdict.failure, verdict.missing
    timing.note = timing.note or verdict.note
    timing.wrong = bool(verdict.failure)
    return timing


def _take_turns(
    case: Case, inputs: Inputs, runs: dict[str, tuple[Run, float]], clock: Clock, cold: bool
) -> dict[str, list[float]]:
    """The seconds of every round of the runs, each with the budget after which it sits out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(-WARM_UP, ROUNDS):
            for name, (run, budget) in runs.items():
                if spent[name] > budget and seconds[name]:
                    continue
                prepared = case.fresh(inputs)
                if cold:
                    clock.empty_caches()
                taken = clock.seconds(run, prepared)
                del prepared
                spent[name] += taken
                if turn >= 0:
                    seconds[name].append(taken)
    finally:
        gc.enable()
    return seconds
