"""Many dampenings of one model, each evaluated and undone: a table, and what is best in it."""

import contextlib
import csv
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unlearn_fast.ops import _checks
from unlearn_fast.ops.dampen import Importances, check_settings
from unlearn_fast.ops.dampen.align import Entry, align, on_device
from unlearn_fast.ops.dampen.selected import Selected

Row = dict[str, float]

SETTINGS = ("alpha", "lam")
COUNTS = ("selected", "share", "mean_factor")


@dataclass(frozen=True)
class Sweep:
    """One row for each (alpha, lam), in the order of the grid: the settings, what they selected, and the scores."""

    rows: tuple[Row, ...]

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of what `evaluate` returned."""
        return _names(self.rows[0]) if self.rows else ()

    def pareto(self, *, low: str, high: str) -> "Sweep":
        """The rows that no other beats: none has less of `low` and no less of `high`, or more of `high` and no more of
        `low`. By rising `low`, equal ones in the order of the grid; rows where one of the two is NaN are left out."""
        self._check(low, high)
        best: list[Row] = []
        numbers = [row for row in self.rows if row[low] == row[low] and row[high] == row[high]]
        for row in sorted(numbers, key=lambda row: (row[low], -row[high])):
            if not best or row[high] > best[-1][high] or (row[low], row[high]) == (best[-1][low], best[-1][high]):
                best.append(row)
        return Sweep(tuple(best))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes all columns."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*SETTINGS, *COUNTS, *self.scores])
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self, path: str | os.PathLike[str], *, low: str, high: str) -> None:
        """Draws every row by two scores, and the line of those that no other beats. Needs matplotlib."""
        from matplotlib.figure import Figure

        best = self.pareto(low=low, high=high).rows
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.scatter([r[low] for r in self.rows], [r[high] for r in self.rows], s=16, color="0.7", label="all")
        axes.plot([r[low] for r in best], [r[high] for r in best], "o-", color="C0", label="none is better in both")
        for row in best:
            axes.annotate(
                f"{row['alpha']:g}, {row['lam']:g}", (row[low], row[high]), xytext=(4, 4), textcoords="offset points",
                fontsize=8,
            )  # fmt: skip
        axes.set(xlabel=f"{low} (less is better)", ylabel=f"{high} (more is better)", title="alpha, lam")
        axes.legend(frameon=False)
        figure.savefig(os.fspath(path), dpi=150)

    def _check(self, *names: str) -> None:
        for name in names:
            if name not in self.scores:
                raise ValueError(f"{name!r} is no score: choose from {', '.join(map(repr, self.scores))}")

    def __str__(self) -> str:
        columns = [*SETTINGS, *COUNTS, *self.scores]
        lines = [columns, *([f"{row[c]:.4g}" for c in columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def sweep(
    model: nn.Module,
    forget: Importances,
    reference: Importances,
    grid: Mapping[str, Sequence[float]] | Iterable[tuple[float, float]],
    evaluate: Callable[[nn.Module], Mapping[str, float] | float],
    *,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
    progress: bool = True,
) -> Sweep:
    """Dampens with every (alpha, lam) of a grid, evaluates, and undoes it: the model is as before, bit for bit.

    No copy of the model is made: what an alpha selects is gathered in one pass over the importances, and then dampened
    with each lam and put back. What a point costs beyond `evaluate` is that edit of the selected values.

    Args:
        model, forget, reference, exponent, cap, floor: as for `dampen_`.
        grid: pairs (alpha, lam), or {"alpha": [...], "lam": [...]} for all combinations.
        evaluate: of the dampened model: {score: value}, or one value, which is called "score". Must not change the
            parameters.
        progress: show a progress bar.

    Returns:
        A `Sweep`: one row a point; `pareto`, `plot` and `to_csv` take it further.

    Raises:
        TypeError, ValueError: an argument does not fit. The model is as before after any error, those of `evaluate`
            included.
    """
    points = _points(grid)
    for alpha, lam in points:
        for name, value in (("alpha", alpha), ("lam", lam)):
            _checks.number(f"{name} in grid", value)
        check_settings(alpha, lam, exponent, cap, floor)
    if not callable(evaluate):
        raise TypeError(f"evaluate is a {type(evaluate).__name__}: it must be a function of the model")
    entries = on_device(align(model, forget, reference).entries)
    devices = dict.fromkeys(entry.param.device for entry in entries)
    groups = [[e for e in entries if e.param.device == device] for device in devices]
    rows: dict[int, Row] = {}
    order = sorted(range(len(points)), key=lambda i: points[i][0])  # points of one alpha share what they change
    with _bar(len(points), progress) as done:
        for alpha, indices in itertools.groupby(order, key=lambda i: points[i][0]):
            selections = [Selected(group, alpha) for group in groups]
            for i in indices:
                try:
                    tables = [selected.dampen_(points[i][1], exponent, cap, floor) for selected in selections]
                    rows[i] = {
                        "alpha": points[i][0],
                        "lam": points[i][1],
                        **_counts(tables, entries),
                        **_scores(evaluate(model)),
                    }
                    if rows[i].keys() != rows[order[0]].keys():
                        first, other = (", ".join(map(repr, _names(rows[k]))) for k in (order[0], i))
                        raise ValueError(f"evaluate returned the scores {other}, and at first {first}: always the same")
                finally:
                    for selected in selections:
                        selected.restore_()
                done()
    return Sweep(tuple(rows[i] for i in range(len(points))))


def _points(grid: Any) -> list[tuple[float, float]]:
    if isinstance(grid, Mapping):
        if set(grid) != set(SETTINGS):
            raise ValueError(f"grid has {', '.join(map(repr, grid))}: it must have 'alpha' and 'lam', and no others")
        for name, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise TypeError(f"grid[{name!r}] is a {type(values).__name__}: it must be a list of numbers")
        pairs: Iterable[Any] = itertools.product(grid["alpha"], grid["lam"])
    elif isinstance(grid, Iterable) and not isinstance(grid, str):
        pairs = grid
    else:
        raise TypeError(f"grid is a {type(grid).__name__}: it must be pairs (alpha, lam), or a mapping of both")
    points = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"grid has {pair!r}: it must be pairs (alpha, lam)")
        points.append((pair[0], pair[1]))
    return points


def _counts(tables: list[torch.Tensor], entries: list[Entry]) -> Row:
    sums = [sum(column) for column in zip(*(table.sum(0).tolist() for table in tables), strict=True)] or [0.0] * 4
    elements = sum(entry.param.numel() for entry in entries)
    selected, factors = sums[0], sums[3]
    return {
        "selected": int(selected),
        "share": selected / elements if elements else 0.0,
        "mean_factor": factors / selected if selected else float("nan"),
    }


def _scores(value: Any) -> Row:
    scores = value if isinstance(value, Mapping) else {"score": value}
    taken = [name for name in scores if name in (*SETTINGS, *COUNTS)]
    if taken:
        raise ValueError(f"evaluate returned {taken[0]!r}, which the table has already: give it another name")
    try:
        return {str(name): float(score) for name, score in scores.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate returned {value!r}: it must be a number, or a mapping name -> number") from error


def _names(row: Row) -> tuple[str, ...]:
    """Of the scores in it."""
    return tuple(name for name in row if name not in (*SETTINGS, *COUNTS))


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], Any]]:
    """What to call after each point."""
    if not show:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="sweep", unit="point", leave=False) as bar:
        yield bar.update
