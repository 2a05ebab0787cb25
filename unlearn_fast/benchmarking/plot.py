"""The benchmarks as a picture."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from unlearn_fast import info
from unlearn_fast.benchmarking.measure import Outcome

# kind -> (colour, meaning)
KINDS = {
    "ours": ("#2a6fbb", "ours"),
    "rival": ("#b9bec6", "others, the same work"),
    "library": ("#8d949f", "other libraries, the same work"),
    "yardstick": ("#e3c48d", "other work, for scale"),
}


def plot(outcomes: list[Outcome], file: Path) -> None:
    """Horizontal bars that start at our time: to the right is slower, to the left faster, on a logarithmic axis."""
    labels: dict[int, str] = {}  # row, counted from the top -> what stands beside it
    titles, row = set(), 0
    bars = sum(len(outcome.timings) for outcome in outcomes)
    figure = Figure(figsize=(10, 1.5 + 0.22 * (bars + 2 * len(outcomes))), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for outcome in outcomes:
        labels[row] = outcome.case.name
        titles.add(row)
        for timing in outcome.timings:
            ratio = outcome.ratio(timing)
            if ratio and timing.median:
                row += 1
                labels[row] = timing.name
                axes.barh(row, ratio - 1, left=1, height=0.75, color=KINDS[timing.kind][0])
                text = _milliseconds(timing.median) + (f", {ratio:.2f}x" if timing.kind != "ours" else "")
                axes.annotate(text, (max(ratio, 1), row), (4, 0), textcoords="offset points", va="center", fontsize=7)
        row += 2
    axes.axvline(1, color=KINDS["ours"][0], linewidth=1.5)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.5), max(right, 2) * 5)  # room for the figures beside the bars
    axes.set_ylim(row, -1)
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
    for tick, label in zip(labels, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if tick in titles else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time over ours, logarithmic (further right is slower)")
    handles = [Patch(color=color, label=meaning) for color, meaning in KINDS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    machine = info.machine()
    gpus = any(outcome.case.device == "cuda" for outcome in outcomes)
    place = machine["gpus"][0] if gpus else f"{machine['processor']}, {machine['threads']} threads"
    place += f", torch {info.versions()['torch']}"
    figure.suptitle(f"Time of each implementation over ours; {place}", fontsize=9)
    figure.savefig(file, dpi=150, format="png")


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
