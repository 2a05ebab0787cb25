"""Per-example against batch-squared importance on the demo's model; fills docs/importance_study.md.

    python benchmarks/study_importance.py            # about 6 minutes on 2 cores
    python benchmarks/study_importance.py --quick    # seconds: a small model, few settings, written to out/study
    python benchmarks/study_importance.py --redraw   # tables and plots again, from the numbers of the last run

Writes benchmarks/results/cpu/importance_study.json, docs/images/importance_*.png, and the marked regions of
docs/importance_study.md. Models, data, importances and measurements are the demo's own.
"""

import argparse
import copy
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from study_importance_plots import draw_agreement, draw_forgetting, draw_layers
from study_importance_tables import USUAL, regions
from study_page import fill
from torch import Tensor, nn

from unlearn_fast import Importance, dampen_, info
from unlearn_fast.demo.ssd import QUICK, Digits, Settings, Split, importances, measure, train

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results/cpu/importance_study.json")
PAGE = Path("docs/importance_study.md")
IMAGES = Path("docs/images")


@dataclass(frozen=True)
class Plan:
    """What is measured. Seeds and digits are not those that the demo's settings were chosen on."""

    model: Settings
    runs: tuple[tuple[int, int], ...] = ((5, 1), (6, 2), (7, 4))  # seed, forgotten digit
    sizes: tuple[int, ...] = (1, 8, 32, 128)  # 1 only compared, and in the first model: it is the definition
    sorted_sizes: tuple[int, ...] = (8, 32, 128)
    unsmoothed_sizes: tuple[int, ...] = (32,)  # for the models that are trained without label smoothing
    per_decade: int = 4
    decades: int = 5  # of alpha, from 0.1 on

    @property
    def alphas(self) -> list[float]:
        steps = range(self.decades * self.per_decade + 1)
        return [float(f"{10 ** (step / self.per_decade - 1):.3g}") for step in steps]


FULL_PLAN = Plan(Settings())
QUICK_PLAN = Plan(replace(QUICK, epochs=3), ((5, 1),), (128,), (128,), (128,), per_decade=1, decades=3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few settings, into out/study")
    parser.add_argument("--redraw", action="store_true", help="only write tables and plots again")
    parser.add_argument("--root", type=Path, help="folder to write below, by default the repository")
    chosen = parser.parse_args(arguments)
    root = chosen.root or (ROOT / "out/study" if chosen.quick else ROOT)
    if chosen.redraw:
        results = json.loads((root / RESULTS).read_text())
    else:
        results = study(QUICK_PLAN, 1) if chosen.quick else study(FULL_PLAN, os.cpu_count() or 1)
        (root / RESULTS).parent.mkdir(parents=True, exist_ok=True)
        (root / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    publish(results, root)


def publish(results: dict[str, Any], root: Path) -> None:
    """Writes the page and its plots below `root`."""
    (root / IMAGES).mkdir(parents=True, exist_ok=True)
    draw_forgetting(results, root / IMAGES / "importance_forgetting.png")
    draw_agreement(results, root / IMAGES / "importance_agreement.png")
    draw_layers(results, root / IMAGES / "importance_layers.png")
    (root / PAGE).write_text(fill((ROOT / PAGE).read_text(), regions(results)))
    print(f"Written to {root}: {PAGE}, {IMAGES}, {RESULTS}")


def study(plan: Plan, workers: int) -> dict[str, Any]:
    """All models: smoothed ones with every form of the importances, unsmoothed ones with a few.

    Each is one thread's work: the batches are too small for two threads to share them well.
    """
    start = time.perf_counter()
    jobs = [(plan, position, smoothed) for smoothed in (True, False) for position in range(len(plan.runs))]
    workers = min(workers, len(jobs))
    if workers > 1:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
            found = list(pool.map(run, *zip(*jobs, strict=True)))
    else:
        with torch.random.fork_rng(devices=[]):
            found = [run(*job) for job in jobs]
    return {
        "command": "python benchmarks/study_importance.py",
        "versions": info.versions(),
        "machine": info.machine() | {"threads": 1, "processes": workers},
        "seconds": time.perf_counter() - start,
        "processor_seconds": sum(one["processor_seconds"] for one in found),
        "plan": asdict(plan),
        "alphas": plan.alphas,
        "runs": [one for one in found if one["smoothed"]],
        "unsmoothed": [one for one in found if not one["smoothed"]],
    }


def run(plan: Plan, position: int, smoothed: bool) -> dict[str, Any]:
    """One model: its forms of importance, each compared with the exact one and followed over all alphas."""
    start = time.process_time()
    seed, digit = plan.runs[position]
    settings = replace(plan.model, seed=seed, digit=digit)
    settings = settings if smoothed else replace(settings, smoothing=0.0)
    torch.manual_seed(seed)
    data = Digits.load(digit, torch.Generator().manual_seed(seed))
    everything = Split(torch.cat([data.retain.x, data.forget.x]), torch.cat([data.retain.y, data.forget.y]))
    model = train(everything, settings, "training", False)
    before = measure(model, data)

    exact = Compared(importances(model, data, settings, "per_example", False))
    forms: dict[str, dict[str, Any]] = {
        "per-example": {
            "selected": exact.shares(plan.alphas),
            "curve": curve(model, data, exact, plan.alphas, before, settings.lam),
        }
    }
    # The forgotten digit is one class: sorting by class changes the order of the retained digits only.
    by_class = data.retain.y.argsort(stable=True)
    in_order = replace(data, retain=Split(data.retain.x[by_class], data.retain.y[by_class]))
    sizes = plan.sizes if smoothed else plan.unsmoothed_sizes
    wanted = [("shuffled", data, size) for size in sizes if size > 1 or position == 0]
    wanted += [("sorted", in_order, size) for size in plan.sorted_sizes if smoothed]
    for order, ordered, size in wanted:
        batch = Compared(importances(model, ordered, replace(settings, batch=size), "batch", False))
        forms[f"batch {size}, {order}"] = {
            "size": size,
            "order": order,
            "selected": batch.shares(plan.alphas),
            "curve": curve(model, data, batch, plan.alphas, before, settings.lam) if size > 1 else None,
            **exact.compare(batch, plan.alphas),
        }
        print(f"seed {seed}, smoothing {settings.smoothing}: batch {size}, {order}", flush=True)
    retrained = measure(train(data.retain, settings, "retraining", False), data) if smoothed else None
    return {
        "seed": seed,
        "digit": digit,
        "smoothed": smoothed,
        "smoothing": settings.smoothing,
        "processor_seconds": time.process_time() - start,
        "examples": {name: len(getattr(data, name).y) for name in ("retain", "forget", "retain_test", "forget_test")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "before": before,
        "retrained": retrained,
        "forms": forms,
    }


def curve(
    model: nn.Module, data: Digits, form: "Compared", alphas: list[float], before: dict[str, float], lam: float
) -> list[dict[str, float] | None]:
    """What SSD does at every alpha, from the same model; None below an alpha that leaves less than half right.

    The published alpha is measured whatever happens.
    """
    points: list[dict[str, float] | None] = []
    lost = False
    for alpha in reversed(alphas):
        if lost and alpha != USUAL:
            points.append(None)
            continue
        dampened = copy.deepcopy(model)
        report = dampen_(dampened, form.forget, form.reference, alpha=alpha, lam=lam)
        points.append(measure(dampened, data) if report.total.selected else before)
        lost = lost or points[-1]["retained"] < 0.5
    return points[::-1]


class Compared:
    """The importances of the forgotten and of the retained digits, and all their values in one row each."""

    def __init__(self, pair: list[Importance]) -> None:
        self.forget, self.reference = pair
        f, r = (torch.cat([value.flatten() for value in importance.values()]) for importance in pair)
        # f = 0 is never selected, whatever r is.
        self.values = {"f": f, "r": r, "f/r": torch.where(f > 0, f / r, 0.0)}
        self.layers: dict[str, slice] = {}
        start = 0
        for layer, names in groupby(self.forget, lambda name: name.rpartition(".")[0]):
            stop = start + sum(self.forget[name].numel() for name in names)
            self.layers[layer] = slice(start, stop)
            start = stop

    def compare(self, other: "Compared", alphas: list[float]) -> dict[str, Any]:
        """How `other` differs from these, the exact ones; parameters that no example reaches are left out."""
        spearman, by_layer, scale = {}, {}, {}
        for name, mine in self.values.items():
            theirs, reached = other.values[name], mine > 0
            spearman[name] = correlation(mine[reached], theirs[reached])
            by_layer[name] = {
                layer: correlation(mine[part][reached[part]], theirs[part][reached[part]])
                for layer, part in self.layers.items()
            }
            scale[name] = float((theirs[reached] / mine[reached]).nan_to_num(1.0).median())
        ratio = other.values["f/r"]
        descending = ratio.sort(descending=True).values
        same_alpha, same_number = [], []
        for alpha in alphas:
            selected, others = self.selected(alpha), other.selected(alpha)
            count = int(selected.sum())
            same_alpha.append(jaccard(selected, others))
            as_many = (ratio >= descending[max(count, 1) - 1]) & (ratio > 0)
            same_number.append(jaccard(selected, as_many) if count else None)
        return {
            "spearman": spearman,
            "spearman_by_layer": by_layer,
            "scale": scale,
            "jaccard": same_alpha,
            "jaccard_same_number": same_number,
        }

    def selected(self, alpha: float) -> Tensor:
        return self.values["f"] > alpha * self.values["r"]

    def shares(self, alphas: list[float]) -> list[float]:
        """Selected over all parameters, for each alpha."""
        return [float(self.selected(alpha).double().mean()) for alpha in alphas]


def jaccard(a: Tensor, b: Tensor) -> float | None:
    """Common over all selected; None where neither selects anything."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else None


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation; None where there is no order: no values, or equal ones."""
    if len(a) == 0:
        return None
    x, y = (ranks - ranks.mean() for ranks in (mean_ranks(a), mean_ranks(b)))
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else None


def mean_ranks(values: Tensor) -> Tensor:  # [N] -> [N] float64
    """Ranks from 1; equal values share the mean of theirs."""
    ordered, order = values.sort()
    _, group, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    mean = counts.cumsum(0).double() - (counts - 1).double() / 2
    return torch.empty_like(values, dtype=torch.float64).scatter_(0, order, mean[group])


if __name__ == "__main__":
    main()
