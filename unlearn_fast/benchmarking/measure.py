"""Times a case: its implementations take turns in one process, each first shown to be right on the timed inputs."""

import gc
import statistics
import time
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from unlearn_fast.benchmarking import memory
from unlearn_fast.benchmarking.case import Case, Inputs, Results, Run

ROUNDS, WARM_UP = 9, 1  # the check has run and compiled each implementation once already
GEMM = 1536  # the square float32 matrix product whose rate is the ceiling of work that is counted in FLOPs

# A wrong result is off by about 1; rounding by far less than this. `unlearn_fast verify` tells how accurate we are.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


@dataclass
class Timing:
    """One implementation in one case."""

    name: str
    kind: str  # "ours", "rival" or "yardstick"
    error: float | None = None  # largest error of the results on the timed inputs, see `error`
    seconds: list[float] = field(default_factory=list)  # one a round
    peak_bytes: int | None = None  # memory beyond the inputs; None where the system does not tell
    failure: str = ""  # why it was not timed
    wrong: bool = False  # because its results were wrong

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Outcome:
    """One case, timed."""

    case: Case
    timings: list[Timing]  # ours first
    ceiling: float  # seconds that a copy, or a matrix product, of the case's cost takes here
    rate: float  # of that copy or product: bytes or FLOPs a second

    @property
    def failed(self) -> bool:
        """Whether ours could not be timed, or any result was wrong."""
        return bool(self.timings[0].failure) or any(timing.wrong for timing in self.timings)

    def ratio(self, timing: Timing) -> float | None:
        """Its time over ours."""
        ours = self.timings[0].median
        return timing.median / ours if timing.median and ours else None

    def share(self, timing: Timing) -> float | None:
        """Of the ceiling. The cost is that of the operator, so a yardstick has none."""
        return self.ceiling / timing.median if timing.median and timing.kind != "yardstick" else None


def measure(case: Case, *, cold: bool = True) -> Outcome:
    """Checks, times and weighs every implementation of a case; with `cold`, the caches are emptied before each run."""
    torch.compiler.reset()  # each case has its own shapes, and torch compiles a function for a few of them only
    inputs, truths = make_inputs(case), cache(lambda exact: exact(case.fresh(inputs)))
    timings, runs = [], {}
    for entrant in case.entrants():
        timing = Timing(entrant.name, entrant.kind)
        timings.append(timing)
        try:
            timing.error = error(entrant.run(case.fresh(inputs)), truths(entrant.exact))
        except Exception as failure:  # a rival that cannot run here (no compiler, say) is part of the outcome
            timing.failure = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
            continue
        timing.wrong = timing.error > TOLERANCE[case.dtype]
        if timing.wrong:
            timing.failure = f"wrong by {timing.error:.1e}, allowed is {TOLERANCE[case.dtype]:.0e}"
        else:
            runs[entrant.name] = entrant.run
    truths.cache_clear()
    work, runs["ceiling"] = _ceiling(case)
    seconds = _take_turns(case, inputs, runs, cold)
    for timing in timings:
        timing.seconds = seconds.get(timing.name, [])
        if timing.seconds:
            timing.peak_bytes = memory.peak_bytes(case.name, timing.name)
    rate = work / statistics.median(seconds["ceiling"])
    return Outcome(case, timings, (case.cost.flops or case.cost.bytes) / rate, rate)


def make_inputs(case: Case) -> Inputs:
    """Random inputs, the same for a case in every process."""
    return case.inputs(torch.Generator().manual_seed(zlib.crc32(case.name.encode())))


def error(results: Results, exact: Results) -> float:
    """Largest error of an element, relative to it, or to the mean magnitude of its tensor where that is larger."""
    if len(results) != len(exact):
        return float("inf")
    return max(_error(result.detach(), truth.detach().double()) for result, truth in zip(results, exact, strict=True))


def _error(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape:
        return float("inf")
    magnitude = exact.abs()
    smallest = torch.finfo(result.dtype).tiny  # where the truth is 0
    relative = (result - exact).abs_() / magnitude.clamp_(min=max(magnitude.mean().item(), smallest))
    return relative.nan_to_num_(nan=float("inf"), posinf=float("inf")).max().item()


def _take_turns(case: Case, inputs: Inputs, runs: dict[str, Run], cold: bool) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-WARM_UP, ROUNDS):
            for name, run in runs.items():
                prepared = case.fresh(inputs)
                if cold:
                    _last_level_cache().sum()
                start = time.perf_counter()
                results = run(prepared)
                end = time.perf_counter()
                del results, prepared
                if turn >= 0:
                    seconds[name].append(end - start)
    finally:
        gc.enable()
    return seconds


def _ceiling(case: Case) -> tuple[int, Run]:
    """The work, in FLOPs or bytes, and the run, of this machine's own product or copy."""
    if case.cost.flops:
        a, b = torch.rand(2, GEMM, GEMM)
        product = torch.zeros(GEMM, GEMM)
        return 2 * GEMM**3, lambda _: (torch.mm(a, b, out=product),)
    source = torch.rand(max(1, case.cost.bytes // 2 // 4))  # one half is read, one written
    target = source.clone()
    return 2 * source.nbytes, lambda _: (target.copy_(source),)


@cache
def _last_level_cache() -> Tensor:
    """A buffer of the cache's size: reading it drives everything else out."""
    return torch.ones(last_level_cache_bytes() // 4)


def last_level_cache_bytes() -> int:
    """Of the first core; 64 MiB where the system does not tell, and 1 GiB at most."""
    sizes = [64 << 20]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = size.read_text().strip()  # such as 32768K
        sizes.append(int(number[:-1]) << {"K": 10, "M": 20, "G": 30}[number[-1]])
    return min(max(sizes), 1 << 30)
