"""Peak memory of FLAT against sequence length; fills docs/flat_memory.md.

    python benchmarks/study_flat_memory.py            # about 5 minutes on 2 cores, 8 GiB of memory
    python benchmarks/study_flat_memory.py --quick    # seconds: small and short, written to out/study
    python benchmarks/study_flat_memory.py --redraw   # table and plot again, from the numbers of the last run

Writes benchmarks/results/cpu/flat_memory.json, docs/images/flat_memory.png, and the marked regions of
docs/flat_memory.md. Every implementation starts from the hidden states and the lm_head's weight, in a process of its
own, and ends with both gradients; the case is `flat_memory` in `unlearn_fast/benchmarking/linear.py`.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from study_page import fill

from unlearn_fast import info
from unlearn_fast.benchmarking.linear import flat_memory
from unlearn_fast.benchmarking.memory import peak_bytes

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results/cpu/flat_memory.json")
PAGE = Path("docs/flat_memory.md")
IMAGE = Path("docs/images/flat_memory.png")

# Implementation -> title, colour (Okabe and Ito's), marker.
SERIES = {
    "released": ("released code", "#d55e00", "^"),
    "torch.compile": ("released form, `torch.compile`", "#e69f00", "D"),
    "ours, from logits": ("`flat_loss`, in place", "#56b4e9", "s"),
    "ours": ("`linear_flat_loss`", "#000000", "o"),
}


class Plan(NamedTuple):
    """What is measured: two answers of T tokens each."""

    H: int
    V: int
    lengths: tuple[int, ...]


FULL_PLAN = Plan(1024, 32_000, (128, 256, 512, 1024, 2048, 4096))
QUICK_PLAN = Plan(64, 4_000, (128, 512))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short, into out/study")
    parser.add_argument("--redraw", action="store_true", help="only write table and plot again")
    parser.add_argument("--root", type=Path, help="folder to write below, by default the repository")
    chosen = parser.parse_args(arguments)
    root = chosen.root or (ROOT / "out/study" if chosen.quick else ROOT)
    for file in (RESULTS, PAGE, IMAGE):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
    if chosen.redraw:
        results = json.loads((root / RESULTS).read_text())
    else:
        results = study(QUICK_PLAN if chosen.quick else FULL_PLAN)
        (root / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    draw(results, root / IMAGE)
    (root / PAGE).write_text(fill((ROOT / PAGE).read_text(), regions(results)))
    print(f"Written to {root}: {PAGE}, {IMAGE}, {RESULTS}")


def study(plan: Plan) -> dict[str, Any]:
    peaks: dict[str, list[int | None]] = {name: [] for name in SERIES}
    for T in plan.lengths:
        for name, found in peaks.items():
            found.append(peak_bytes(partial(flat_memory, 1, T, plan.H, plan.V, torch.float32), name))
            print(f"T {T}, {name}: {_mib(found[-1])} MiB", flush=True)
    return {
        "command": "python benchmarks/study_flat_memory.py",
        "versions": info.versions(),
        "machine": info.machine(),
        "plan": plan._asdict(),
        "peak_bytes": peaks,
        "gradient_bytes": [_gradient_bytes(plan, T) for T in plan.lengths],
        "logits_bytes": [2 * T * plan.V * 4 for T in plan.lengths],
    }


def _gradient_bytes(plan: Plan, T: int) -> int:
    """Of the weight and of both sides' hidden states: the results, which every implementation has to hold."""
    return (plan.V + 2 * T) * plan.H * 4


def regions(results: dict[str, Any]) -> dict[str, str]:
    """Name of a marked region of the page -> its text."""
    plan, machine, versions = results["plan"], results["machine"], results["versions"]
    setting = (
        f"H {plan['H']:,}, V {plan['V']:,}, two answers of T tokens each, float32; {machine['processor']},"
        f" {machine['threads']} threads, torch {versions['torch']}, unlearn_fast {versions['unlearn_fast']}."
    )
    titles = ["T", *(title for title, *_ in SERIES.values()), "gradients alone", "logits alone"]
    columns = [*(results["peak_bytes"][name] for name in SERIES), results["gradient_bytes"], results["logits_bytes"]]
    rows = [titles, ["---"] * len(titles)]
    rows += [[f"{T:,}", *(_mib(column[i]) for column in columns)] for i, T in enumerate(results["plan"]["lengths"])]
    return {"setting": setting, "table": "\n".join(f"| {' | '.join(row)} |" for row in rows)}


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lengths = results["plan"]["lengths"]
    for name, (title, color, marker) in SERIES.items():
        sizes = [float("nan") if peak is None else peak / 2**20 for peak in results["peak_bytes"][name]]
        axes.plot(lengths, sizes, color=color, marker=marker, label=title.replace("`", ""))
    for key, style in (("gradient_bytes", ":"), ("logits_bytes", "--")):
        label = f"{key.partition('_')[0]} alone".replace("gradient ", "gradients ")
        axes.plot(lengths, [size / 2**20 for size in results[key]], color="#999999", linestyle=style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{T:,}" for T in lengths])
    axes.set_xlabel("T, tokens of each answer")
    axes.set_ylabel("peak memory beyond hidden states and weight, MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


if __name__ == "__main__":
    main()
