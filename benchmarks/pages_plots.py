"""The plots of the pages, from records: SVG, the same bytes for the same record and matplotlib."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, PercentFormatter
from pages_records import bench_of, cases_of, name, ours, ratio

# Okabe and Ito's colours, which the colour-blind tell apart; each kind of rival has a marker of its own besides.
RIVALS = {
    "plain torch, released code": ("#d55e00", "o"),
    "torch.compile": ("#0072b2", "s"),
    "other libraries": ("#009e73", "^"),
    "other work, for scale": ("#777777", "x"),
}
CEILINGS = {"of a copy's bandwidth": "#56b4e9", "of a matrix product's rate": "#e69f00"}
OURS_IN_PARTS = ("reference", "the operator alone", "one tensor", "one tensor, the operator alone")


def draw_shares(records: list[dict[str, Any]], title: str, path: Path, made_from: str) -> None:
    """Bars: what of its ceiling each case reaches."""
    found = [case for record in records for case in cases_of(record) if ours(case)["share_of_ceiling"]]
    figure, axes = _rows([name(case) for case in found])
    for row, case in enumerate(found):
        share = ours(case)["share_of_ceiling"]
        label = list(CEILINGS)[case["cost"]["flops"] > 0]
        axes.barh(row, share, height=0.7, color=CEILINGS[label])
        axes.annotate(f"{share:.0%}", (0, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 1.03 * max(1, *(ours(case)["share_of_ceiling"] for case in found)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the ceiling; the line is the ceiling")
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in CEILINGS.items()],
        loc="outside lower center",
        ncols=2,
        fontsize=9,
    )
    _save(figure, records, title, path, made_from)


def draw_rivals(records: list[dict[str, Any]], title: str, path: Path, made_from: str) -> None:
    """Points: the time of each rival over ours; to the right of the line we are faster."""
    found = [case for record in records for case in cases_of(record) if ours(case)["ms"]]
    figure, axes = _rows([name(case) for case in found])
    axes.set_xscale("log")
    for row, case in enumerate(found):
        for timing in case["timings"]:
            if timing["kind"] != "ours" and timing["name"] not in OURS_IN_PARTS and timing["ms"]:
                color, marker = RIVALS[_kind(timing)]
                axes.plot(ratio(timing, ours(case)), row, color=color, marker=marker, markersize=6, linestyle="none")
    axes.axvline(1, color="black", linewidth=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("time over ours, logarithmic; to the right of the line we are faster")
    for label, (color, marker) in RIVALS.items():
        axes.plot([], [], color=color, marker=marker, markersize=6, linestyle="none", label=label)
    figure.legend(loc="outside lower center", ncols=len(RIVALS), fontsize=9)
    _save(figure, records, title, path, made_from)


def _kind(timing: dict[str, Any]) -> str:
    plain, compiled, libraries, other = RIVALS
    if timing["name"].startswith("torch.compile"):
        return compiled
    return {"rival": plain, "library": libraries, "yardstick": other}[timing["kind"]]


def _rows(labels: list[str]) -> tuple[Figure, Axes]:
    """One row a case, from the top; the page behind is white wherever it is shown."""
    figure = Figure(figsize=(11, 1.4 + 0.27 * len(labels)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, records: Iterable[dict[str, Any]], title: str, path: Path, made_from: str) -> None:
    machine = bench_of(next(iter(records)))["machine"]
    place = ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['threads']} threads"
    figure.suptitle(f"{title}; {place}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": "benchmarks/pages.py", "Title": title, "Identifier": made_from}
    with rc_context({"svg.hashsalt": "unlearn_fast", "svg.fonttype": "none"}):  # text stays text: small, and found
        figure.savefig(path, format="svg", metadata=metadata)


DRAWN = {"rivals": draw_rivals, "ceiling": draw_shares}
