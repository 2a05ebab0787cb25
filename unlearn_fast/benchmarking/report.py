"""What the benchmarks say, for people and as JSON."""

from typing import Any

import torch

from unlearn_fast import info
from unlearn_fast.benchmarking import fisher_report, fisher_rivals, measure
from unlearn_fast.benchmarking.case import Case
from unlearn_fast.benchmarking.clock import Cpu, Cuda, last_level_cache_bytes
from unlearn_fast.benchmarking.fisher import FisherCase
from unlearn_fast.benchmarking.measure import Outcome, Timing

WITH_HOST = "diagonal_fisher, ssd_ and flat_training_step"


def explained(cases: list[Case]) -> str:
    """How to read what `text` tells of these cases."""
    on_gpu = any(case.device == "cuda" for case in cases)
    place = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    lines = [
        f"median of {measure.ROUNDS} rounds, fewer for rivals that take over {measure.BUDGET['rival']:.0f} s; {place}"
    ]
    lines.append("±: the rounds' interquartile range over their median")
    if on_gpu:
        lines.append(f"time of the GPU, whose launches are queued ahead; of {WITH_HOST}, with the host's")
    if not all(isinstance(case, FisherCase) for case in cases):
        lines += [
            "ratio: time over ours; extra memory: peak beyond the inputs;",
            "ceiling: share of what this device's own copy, or matrix product, reaches on the same cost;"
            " (other work): timed for scale, not a rival",
        ]
    if any(isinstance(case, FisherCase) for case in cases):
        lines.append(fisher_report.EXPLAINED)
    return "\n".join(lines)


def text(outcome: Outcome) -> str:
    """One block of lines."""
    if isinstance(outcome.case, FisherCase):
        return "\n".join(fisher_report.table(outcome))
    unit = "GFLOP/s" if outcome.case.counted().flops else "GB/s"
    title = f"{outcome.case.name}  (ceiling {outcome.ceiling * 1e3:.3g} ms at {outcome.rate / 1e9:.3g} {unit})"
    rows = [_row(outcome, timing) for timing in outcome.timings]
    table = info.table(("", f"{'ms':>9}", "  ±", "ratio", "extra memory", "ceiling"), rows)
    peaks = {t.name: t.peak_bytes for t in outcome.timings if t.peak_bytes is not None and t.kind != "yardstick"}
    return "\n  ".join([title, *table, *outcome.case.remarks(peaks)])


def _row(outcome: Outcome, timing: Timing) -> tuple[str, ...]:
    name = timing.name + (" (other work)" if timing.kind == "yardstick" else "")
    if timing.median is None:
        return name, "not timed:", timing.failure, "", "", ""
    ratio, share, peak = outcome.ratio(timing), outcome.share(timing), timing.peak_bytes
    return (
        name,
        f"{timing.median * 1e3:9.3f}",
        fisher_report.plus_minus(timing),
        f"{ratio:5.2f}" if ratio else "",
        f"{peak / 2**20:8.1f} MiB" if peak is not None else "unknown",
        f"{share:7.1%}" if share else "",
    )


def as_json(outcomes: list[Outcome], command: str) -> dict[str, Any]:
    """Everything that is needed to judge the numbers, and every round's time."""
    rates: dict[str, list[float]] = {}
    for outcome in outcomes:
        unit = "gemm_flops_per_second" if outcome.case.counted().flops else "copy_bytes_per_second"
        rates.setdefault(unit, []).append(outcome.rate)
    return {
        "command": command,
        "versions": info.versions() | fisher_rivals.versions(),
        "machine": info.machine() | {"last_level_cache_bytes": last_level_cache_bytes()},
        "method": {
            "statistic": "median of the rounds; ratio of medians to ours",
            "order": "one process, the implementations take turns",
            "rounds": measure.ROUNDS,
            "budget_seconds": measure.BUDGET,
            "warm_up_rounds": measure.WARM_UP,
            "error": "largest, relative to the float64 element or to the mean magnitude of its tensor;"
            " of diagonal_fisher, of a parameter's importance in norm",
            "ceiling": "a copy of the same bytes, or a matrix product, timed in turn: of size"
            f" {Cpu.GEMM} in float32 on a CPU, of {Cuda.GEMM} in the case's dtype on a GPU",
            "peak_bytes": "memory at its highest less that before the run: resident, in a process of its own, on a CPU;"
            " allocated through torch on a GPU",
            "spread": "interquartile range of the rounds over their median",
            "gpu_time": "between events around the run, whose launches wait in the queue until all are there; of"
            f" {WITH_HOST}, the host's time until the GPU is done",
        },
        "ceilings": {name: max(values) for name, values in rates.items()},
        "cases": [_case_as_json(outcome) for outcome in outcomes],
    }


def _case_as_json(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    return {
        "operator": case.operator,
        "device": case.device,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "variant": case.variant,
        "cost": case.counted()._asdict(),
        "baseline": outcome.baseline.name,
        **case.facts(),
        "ceiling_ms": outcome.ceiling * 1e3,
        "ceiling_per_second": outcome.rate,  # bytes copied, or FLOPs of a product, in turn with these timings
        "ceiling_spread": outcome.rate_spread,
        "timings": [
            {
                "name": timing.name,
                "kind": timing.kind,
                "ms": timing.median and timing.median * 1e3,
                "spread": timing.spread,
                "ratio": outcome.ratio(timing),
                "over_baseline": outcome.over_baseline(timing),
                "share_of_ceiling": outcome.share(timing),
                "peak_bytes": timing.peak_bytes,
                "peaks_bytes": timing.peaks,
                "error": timing.error if timing.error != float("inf") else None,  # JSON has no infinity
                "missing": timing.missing,
                "failure": timing.failure,
                "note": timing.note,
                "rounds_ms": [seconds * 1e3 for seconds in timing.seconds],
            }
            for timing in outcome.timings
        ],
    }
