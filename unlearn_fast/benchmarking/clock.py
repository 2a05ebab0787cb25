"""How long a run takes on a device, what memory it needs there, and what the device can do at best."""

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from unlearn_fast.benchmarking import memory
from unlearn_fast.benchmarking.case import Case, Cost, Inputs, Run, make_inputs

HEAD_START = 20_000_000  # cycles of a GPU, some 10 ms, in which the launches of a run queue up


class Clock(Protocol):
    """A device's."""

    patience: float  # how much of the usual budget an implementation has

    def empty_caches(self) -> None:
        """Drives everything out of the last-level cache."""

    def seconds(self, run: Run, inputs: Inputs) -> float:
        """The time of one run."""

    def peak_bytes(self, case: Case, entrant: str, find: Callable[[str], Case]) -> int | None:
        """Memory of one run beyond the inputs; None where the system does not tell."""

    def ceiling(self, cost: Cost, dtype: torch.dtype) -> tuple[int, Run]:
        """Work, in FLOPs or bytes, and the device's own product or copy that does it."""


def of(case: Case) -> Clock:
    return Cuda(with_host=case.with_host) if case.device == "cuda" else Cpu()


class Cpu:
    patience = 1.0
    GEMM = 1536  # the square matrix product, in float32, whose rate is the ceiling of work that is counted in FLOPs

    def empty_caches(self) -> None:
        _buffer("cpu", last_level_cache_bytes()).sum()

    def seconds(self, run: Run, inputs: Inputs) -> float:
        start = time.perf_counter()
        results = run(inputs)
        end = time.perf_counter()
        del results
        return end - start

    def peak_bytes(self, case: Case, entrant: str, find: Callable[[str], Case]) -> int | None:
        return memory.peak_bytes(partial(find, case.name), entrant)

    def ceiling(self, cost: Cost, dtype: torch.dtype) -> tuple[int, Run]:
        return _ceiling(cost, "cpu", self.GEMM, torch.float32)


class Cuda:
    """The GPU's time alone, for which the run's launches wait in the queue until all are there; or, `with_host`, all
    the time until the GPU is done.
    """

    patience = 0.1
    GEMM = 8192  # in the case's dtype

    def __init__(self, *, with_host: bool) -> None:
        self.with_host = with_host

    def empty_caches(self) -> None:
        _buffer("cuda", 4 * torch.cuda.get_device_properties("cuda").L2_cache_size).zero_()

    def seconds(self, run: Run, inputs: Inputs) -> float:
        torch.cuda.synchronize()
        if self.with_host:
            start = time.perf_counter()
            results = run(inputs)
            torch.cuda.synchronize()
            end = time.perf_counter()
            del results
            return end - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        first.record()
        results = run(inputs)
        last.record()
        torch.cuda.synchronize()
        del results
        return first.elapsed_time(last) / 1e3

    def peak_bytes(self, case: Case, entrant: str, find: Callable[[str], Case]) -> int | None:
        run = next(e for e in case.entrants() if e.name == entrant).run
        inputs = case.fresh(make_inputs(case))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run(inputs)
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before

    def ceiling(self, cost: Cost, dtype: torch.dtype) -> tuple[int, Run]:
        return _ceiling(cost, "cuda", self.GEMM, dtype)


def _ceiling(cost: Cost, device: str, size: int, dtype: torch.dtype) -> tuple[int, Run]:
    if cost.flops:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        product = torch.zeros_like(a)
        return 2 * size**3, lambda _: (torch.mm(a, b, out=product),)
    source = torch.rand(max(1, cost.bytes // 2 // 4), device=device)  # one half is read, one written
    target = source.clone()
    return 2 * source.nbytes, lambda _: (target.copy_(source),)


@cache
def _buffer(device: str, size: int) -> Tensor:
    return torch.ones(size // 4, device=device)


def last_level_cache_bytes() -> int:
    """Of the first core; 64 MiB where the system does not tell, and 1 GiB at most."""
    sizes = [64 << 20]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = size.read_text().strip()  # such as 32768K
        sizes.append(int(number[:-1]) << {"K": 10, "M": 20, "G": 30}[number[-1]])
    return min(max(sizes), 1 << 30)
