"""The demo's two pictures. Figures are drawn without pyplot: no window, no global state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw_ssd(part: Mapping[str, Any], path: Path) -> None:
    """Share of the values that SSD dampened, one bar a layer, from the image at the top to the answer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    layers = part["dampened"]["layers"]
    figure = Figure(figsize=(7, 1.2 + 0.19 * len(layers)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(layers)), list(layers.values()), color="tab:blue")
    axes.set_yticks(range(len(layers)), list(layers), fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the layer's values that were dampened")
    axes.set_title(f"SSD forgets the {part['settings']['digit']}: {part['dampened']['share']['ssd']:.2%} of all values")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def draw_flat(part: Mapping[str, Any], path: Path) -> None:
    """Probability of each kind of answer before and after FLAT, on a logarithmic axis."""
    from matplotlib.figure import Figure

    names = list(part["before"])
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, when, color in ((-0.2, "before", "tab:gray"), (0.2, "after", "tab:blue")):
        values = [part[when][name]["geometric"] for name in names]
        bars = axes.bar([i + offset for i in range(len(names))], values, 0.4, label=when, color=color)
        axes.bar_label(bars, fmt="%.2g", fontsize=8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("probability of the answer (geometric mean)")
    axes.set_title(f"FLAT forgets in {part['steps']} steps")
    axes.legend()
    figure.savefig(path, dpi=150)
