"""Every Triton kernel over a short list of configurations, on the shapes of the GPU's benchmarks.

`python benchmarks/gpu_tune.py OUT.json [--seconds S]`: one row a kernel, shape and dtype, with the time of each
configuration (median of a few rounds, in which they take turns), the fastest, and the one that ships. A configuration
counts only if its result is that of the shipped one but for rounding. Rows are written as they are measured, the ones
that matter most first; what the time does not allow is left out.
"""

import argparse
import gc
import json
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unlearn_fast.benchmarking import cases
from unlearn_fast.benchmarking.case import TOLERANCE, Inputs, Run, error, make_inputs, normal
from unlearn_fast.benchmarking.clock import Clock, Cuda
from unlearn_fast.ops import _triton
from unlearn_fast.ops._triton import Block
from unlearn_fast.ops._triton_rows import Pace
from unlearn_fast.ops.sum_grad_squared_conv import triton as conv
from unlearn_fast.ops.sum_grad_squared_embedding import triton as embedding
from unlearn_fast.ops.sum_grad_squared_linear import triton as linear
from unlearn_fast.ops.sum_grad_squared_scale import triton as scale
from unlearn_fast.ops.token_kl import triton as token_kl
from unlearn_fast.ops.token_logprobs import triton as token_logprobs

ROUNDS = 5
PACES = [(2, 4, 5), (1, 4, 5), (4, 4, 4), (2, 8, 5), (1, 8, 5), (2, 4, 4), (2, 4, 7)]
BLOCKS = [(512, 4), (1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8)]

# Operator -> module, what is set there, and to what; of several names, values for all.
SHORT_LISTS: dict[str, tuple[Any, tuple[str, ...], list[tuple[Any, ...]]]] = {
    "token_logprobs": (token_logprobs, ("PACE",), [(Pace(*pace),) for pace in PACES]),
    "token_kl": (token_kl, ("PACE",), [(Pace(*pace),) for pace in PACES]),
    "sum_grad_squared_embedding_": (
        embedding,
        ("ROWS", "COLUMNS"),
        [(rows, columns) for columns in (128, 256, 512) for rows in (4, 8, 16)],
    ),
    "sum_grad_squared_scale_": (scale, ("BLOCK",), [(Block(*block),) for block in BLOCKS]),
    "add_parts": (_triton, ("ADDED",), [(Block(*block),) for block in BLOCKS]),
    "scale_": (_triton, ("SCALED",), [(Block(*block),) for block in BLOCKS]),
}
BY_TILES = {"sum_grad_squared_linear_": linear, "sum_grad_squared_conv_": conv}  # their lists are in their files
LONGEST = 1 << 31  # bytes of logits: longer rows take other memory, not other configurations


@dataclass(frozen=True)
class Job:
    """What is swept: a kernel on inputs."""

    kernel: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], Inputs]
    run: Run


def jobs(device: str) -> Iterator[Job]:
    """Of the benchmarks' cases those with a short list; and what the kernels share."""
    for case in cases.on(device, quick=device == "cpu"):
        if (case.operator in SHORT_LISTS or case.operator in BY_TILES) and case.cost.bytes <= 2 * LONGEST:
            kernel = f"{case.operator} {case.variant}".strip()
            yield Job(kernel, case.shape, case.dtype, lambda case=case: case.fresh(make_inputs(case)), case.ours)
    size = 1 << (26 if device == "cuda" else 10)

    def generated(*shape: int) -> Callable[[], Inputs]:
        return lambda: {"x": normal(torch.Generator(device).manual_seed(0), *shape)}

    def add_parts(x: Inputs) -> tuple[torch.Tensor]:
        out = torch.zeros_like(x["x"][0])
        _triton.add_parts(out, x["x"], 1.0)
        return (out,)

    def scale_(x: Inputs) -> tuple[torch.Tensor]:
        half = torch.full((), 0.5, device=device)
        _triton.scale_(x["x"], half)
        return (x["x"],)

    yield Job("add_parts", f"[4, 1, 16, {size // 16}]", torch.float32, generated(4, 1, 16, size // 16), add_parts)
    yield Job("scale_", f"[{size}]", torch.float32, generated(size), scale_)


def configurations(job: Job, inputs: Inputs) -> tuple[str, list[tuple[str, Callable[[], Any]]]]:
    """What ships, and each configuration with a context in which it serves."""
    operator = job.kernel.split()[0]
    if operator in BY_TILES:
        return _tiles(BY_TILES[operator], job, inputs)
    module, names, choices = SHORT_LISTS[operator]
    shipped = tuple(getattr(module, name) for name in names)

    def title(values: tuple[Any, ...]) -> str:
        if len(names) == 1:
            return str(values[0])
        return ", ".join(f"{value} {name.lower()}" for name, value in zip(names, values, strict=True))

    listed = list(dict.fromkeys([shipped, *choices]))
    return title(shipped), [(title(v), lambda v=v: _setting(module, dict(zip(names, v, strict=True)))) for v in listed]


def _tiles(module: Any, job: Job, inputs: Inputs) -> tuple[str, list[tuple[str, Callable[[], Any]]]]:
    """The tiles that a call offers to be chosen from, and its choice."""
    offered: list[Any] = []

    def choose(key: Any, tiles: Any, *rest: Any) -> Any:
        offered[:] = [tiles, _triton.choose(key, tiles, *rest)]
        return offered[1]

    with _setting(module, {"choose": choose}):
        job.run(inputs)
    tiles, chosen = offered
    return str(chosen), [(str(t), lambda t=t: _setting(module, {"choose": lambda *_: t})) for t in tiles]


@contextmanager
def _setting(module: Any, values: dict[str, Any]) -> Iterator[None]:
    """The module with other values; launches that it has prepared are forgotten, before and after."""
    forget = [f.cache_clear for f in (getattr(module, "_call", None), _triton.adding) if f is not None]
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(unittest.mock.patch.object(module, name, value))
        for end in forget:
            end()
            stack.callback(end)
        yield


def sweep(job: Job, clock: Clock) -> dict[str, Any]:
    """One row: every configuration's median time, or why it has none."""
    inputs = job.inputs()
    shipped, listed = configurations(job, inputs)
    results, rounds, failures = {}, {title: [] for title, _ in listed}, {}
    for title, serving in sorted(listed, key=lambda entry: entry[0] != shipped):  # the shipped one first
        try:
            with serving():
                results[title] = [None if r is None else r.detach() for r in job.run(job.inputs())]
        except Exception as failure:  # too much shared memory, say
            failures[title] = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
            continue
        off = error(tuple(results[title]), tuple(results[shipped])) if shipped in results else float("inf")
        if off > TOLERANCE[job.dtype]:
            failures[title] = f"differs by {off:.1e} from what ships"
        if title != shipped:
            del results[title]
    for _ in range(ROUNDS):
        for title, serving in listed:
            if title not in failures:
                with serving():
                    clock.empty_caches()
                    rounds[title].append(clock.seconds(job.run, inputs))
    medians = {title: statistics.median(times) * 1e3 for title, times in rounds.items() if times}
    return {
        "kernel": job.kernel,
        "shape": job.shape,
        "dtype": str(job.dtype).removeprefix("torch."),
        "configurations": [
            {"configuration": title, "ms": medians.get(title), "failure": failures.get(title, "")}
            for title, _ in listed
        ],
        "best": min(medians, key=lambda title: medians[title]) if medians else None,
        "shipped": shipped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="file for the rows, as JSON")
    parser.add_argument("--seconds", type=float, default=60, help="begin no further row after so long (default: 60)")
    arguments = parser.parse_args()
    end, rows, clock = time.monotonic() + arguments.seconds, [], Cuda(with_host=False)
    for job in jobs("cuda"):
        if time.monotonic() > end:
            print(f"no time for {job.kernel} {job.shape} and what follows")
            break
        rows.append(sweep(job, clock))
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{rows[-1]['kernel']} {job.shape} {rows[-1]['dtype']}: {rows[-1]['best']}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
