"""The pictures of docs/importance_study.md. Figures are drawn without pyplot, as the demo's are."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colours, which the colour-blind tell apart; each form has a marker of its own besides.
STYLES = {
    "per-example": ("#000000", "o"),
    1: ("#999999", "v"),
    8: ("#56b4e9", "s"),
    32: ("#e69f00", "^"),
    128: ("#d55e00", "D"),
}
ORDERS = {"shuffled": "retained digits shuffled", "sorted": "retained digits sorted by class"}
MEASURES = {
    "retained": "accuracy,\nretained digits",
    "forgotten": "accuracy,\nforgotten digit",
    "membership": "forgotten images\ntaken for members",
}


def draw_forgetting(results: dict[str, Any], path: Path) -> None:
    """Each measurement over alpha: mean of the models as a line, their range as a band."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(ORDERS), sharex=True, sharey=True)
    alphas = results["alphas"]
    for column, (order, title) in enumerate(ORDERS.items()):
        grid[0, column].set_title(title)
        grid[-1, column].set_xlabel("alpha (selected where f > alpha * r)")
        for row, (measure, label) in enumerate(MEASURES.items()):
            axes = grid[row, column]
            for form in _forms(results, order, exact=True):
                curves = [
                    [point and point[measure] for point in run["forms"][form]["curve"] or [None] * len(alphas)]
                    for run in results["runs"]
                    if form in run["forms"]
                ]
                _line(axes, alphas, curves, results["runs"][0]["forms"][form].get("size", form))
            retrained = [run["retrained"][measure] for run in results["runs"]]
            axes.axhline(sum(retrained) / len(retrained), color="black", linestyle=":", label="retrained")
            axes.set_xscale("log")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(label)
    _legend(figure, grid[0, 0])
    figure.savefig(path, dpi=130)


def draw_agreement(results: dict[str, Any], path: Path) -> None:
    """Common share of the selected parameters: at the same alpha above, at the same number of them below."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    kinds = {"jaccard": "same alpha", "jaccard_same_number": "alpha chosen to select\nas many as per-example"}
    grid = figure.subplots(len(kinds), len(ORDERS), sharex=True, sharey=True)
    for column, (order, title) in enumerate(ORDERS.items()):
        grid[0, column].set_title(title)
        grid[-1, column].set_xlabel("alpha of the per-example form")
        for row, (key, label) in enumerate(kinds.items()):
            axes = grid[row, column]
            for form in _forms(results, order, exact=False):
                found = [run["forms"][form] for run in results["runs"] if form in run["forms"]]
                _line(axes, results["alphas"], [one[key] for one in found], found[0]["size"])
            axes.set_xscale("log")
            axes.set_ylim(0, 1.03)
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(f"Jaccard index,\n{label}")
    _legend(figure, grid[0, 0])
    figure.savefig(path, dpi=130)


def draw_layers(results: dict[str, Any], path: Path) -> None:
    """Spearman of f, r and f/r in each layer, the mean of the models, from the image at the top to the answer."""
    names = ("f", "r", "f/r")
    runs = results["runs"]
    layers = list(next(f for f in runs[0]["forms"].values() if "size" in f)["spearman_by_layer"]["f"])
    figure = Figure(figsize=(10, 1.6 + 0.2 * len(layers)), layout="constrained")
    grid = figure.subplots(1, len(names), sharex=True, sharey=True)
    for axes, name in zip(grid, names, strict=True):
        for order, face in (("shuffled", None), ("sorted", "none")):
            for form in _forms(results, order, exact=False):
                size = runs[0]["forms"][form]["size"]
                if size == 1:  # the same numbers as per-example
                    continue
                found = [run["forms"][form] for run in runs]
                color, marker = STYLES[size]
                label = f"batch {size}, {order}"
                by_layer = [one["spearman_by_layer"][name] for one in found]
                means = [_mean([values[layer] for values in by_layer]) for layer in layers]
                style = {"color": color, "marker": marker, "markerfacecolor": face or color, "markersize": 5}
                axes.plot(means, range(len(layers)), linestyle="none", label=label, **style)
        axes.set_xlabel(f"Spearman of {name}")
        axes.grid(alpha=0.3)
    grid[0].set_yticks(range(len(layers)), layers, fontsize=7)
    grid[0].set_ylim(len(layers) - 0.4, -0.6)
    _legend(figure, grid[-1])
    figure.savefig(path, dpi=130)


def _forms(results: dict[str, Any], order: str, *, exact: bool) -> list[str]:
    forms = results["runs"][0]["forms"]
    return [name for name, form in forms.items() if form.get("order", order if exact else None) == order]


def _line(axes: Axes, alphas: list[float], curves: list[list[float | None]], key: str | int) -> None:
    """Over the alphas at which every model has a value."""
    color, marker = STYLES[key]
    known = [at for at in range(len(alphas)) if all(curve[at] is not None for curve in curves)]
    if not known:
        return
    alphas = [alphas[at] for at in known]
    columns = [[curve[at] for curve in curves] for at in known]
    label = key if isinstance(key, str) else f"batch {key}"
    means = [sum(values) / len(values) for values in columns]
    axes.plot(alphas, means, color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
    axes.fill_between(
        alphas, [min(v) for v in columns], [max(v) for v in columns], color=color, alpha=0.15, linewidth=0
    )


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=9)
