"""The cases of dampening and of what chooses its settings."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import unlearn_fast
from unlearn_fast import reference
from unlearn_fast.benchmarking import models, rivals
from unlearn_fast.benchmarking.case import Case, Cost, Inputs, Results, Run, compiled, normal

FLOAT32 = torch.float32
ALPHA = 2.0  # of all cases but the sweep
Dampen = Callable[..., Any]


def smallest() -> list[Case]:
    return [
        dampen(20_000, share=0.5),
        dampen(20_000, share=0.001),
        clustered(20_000, tensors=40),
        many(4_000, tensors=8),
        undo(20_000, tensors=40),
        percentile(20_000),
        curve(20_000, alphas=5),
        mask(20_000),
        sweep(width=4, image=8, points=2),
    ]


def full() -> list[Case]:
    return [
        dampen(64_000_000, share=0.25),
        dampen(64_000_000, share=0.001),
        dampen(64_000_000, share=0.25, dtype=torch.bfloat16),
        clustered(64_000_000, tensors=400),
        many(1_000_000, tensors=400),
        undo(64_000_000, tensors=400),
        percentile(100_000_000),
        curve(64_000_000, alphas=100),
        mask(16_000_000),
        sweep(width=64, image=32, points=10),
    ]


def on_gpu() -> list[Case]:
    return [
        dampen(1_000_000_000, share=0.5),
        dampen(1_000_000_000, share=0.001),
        dampen(1_000_000_000, share=0.5, dtype=torch.bfloat16),
    ]


def dampen(P: int, *, share: float, dtype: torch.dtype = FLOAT32) -> Case:
    """Selects about `share` of the parameters, spread evenly."""
    return Case(
        operator="dampen_",
        shape=f"[{P}]",
        dtype=dtype,
        variant=f"{share:g} selected",
        inputs=lambda g: _importances(P, share, dtype, g),
        overwritten=("params",),
        ours=_one(_ours),
        exact=_one(reference.dampen_),  # in float32, as released: float64 would select others at the threshold
        rivals={
            "reference": _one(reference.dampen_),
            "torch.compile": _one(_each(compiled(rivals.where_dampen_))),
            "released loop": _one(_each(rivals.released_dampen_)),
        },
        cost=Cost(
            "f and r read; p read and written in the 64-byte lines where a value is selected",
            bytes=int(P * (8 + 2 * dtype.itemsize * (1 - (1 - share) ** (64 // dtype.itemsize)))),
        ),
    )


@dataclass(frozen=True)
class Split(Case):
    """A case whose runs find each input a second time, as a list of `tensors` parts of it."""

    tensors: int = 1

    def fresh(self, inputs: Inputs) -> Inputs:
        whole = super().fresh(inputs)
        return whole | {f"{name} in parts": list(value.chunk(self.tensors)) for name, value in whole.items()}


def clustered(P: int, *, tensors: int) -> Case:
    """As SSD selects: a twentieth of the tensors holds all that is selected, half of their values."""
    return Split(
        operator="dampen_",
        shape=f"{tensors} x [{P // tensors}]",
        dtype=FLOAT32,
        variant="all selected in 5 % of the tensors",
        inputs=lambda g: _clustered(P, tensors, g),
        overwritten=("params",),
        ours=_parts(_ours),
        exact=_one(reference.dampen_),
        rivals={
            "torch.compile": _parts(_each(compiled(rivals.where_dampen_))),
            "torch.compile of one tensor": _one(_each(compiled(rivals.where_dampen_))),
            "released loop": _parts(_each(rivals.released_dampen_)),
        },
        cost=Cost("f and r read; p read and written where a value is selected", bytes=int(P * (8 + 8 * 0.05))),
        tensors=tensors,
    )


def many(P: int, *, tensors: int) -> Case:
    """Small tensors, against one of as many elements."""
    return Split(
        operator="dampen_",
        shape=f"{tensors} x [{P // tensors}]",
        dtype=FLOAT32,
        variant="small tensors",
        inputs=lambda g: _importances(P, 0.25, FLOAT32, g),
        overwritten=("params",),
        ours=_parts(_ours),
        exact=_one(reference.dampen_),
        rivals={
            "the operator alone": _parts(_operator),
            "one tensor": _one(_ours),
            "one tensor, the operator alone": _one(_operator),
            "torch.compile": _parts(_each(compiled(rivals.where_dampen_))),
            "released loop": _parts(_each(rivals.released_dampen_)),
        },
        cost=Cost("f and r read, p read and written", bytes=16 * P),
        tensors=tensors,
    )


def undo(P: int, *, tensors: int) -> Case:
    """Dampening and putting it back, against a copy of the parameters."""

    def ours(x: Inputs) -> Results:
        report = unlearn_fast.dampen_(*_of_parts(x), alpha=ALPHA, undo=True)
        assert report.undo is not None
        unlearn_fast.undo_(report.undo)
        return (x["params"],)

    def backed_up(x: Inputs) -> Results:
        backup = x["params"].clone()
        _ours(*_of_parts(x), alpha=ALPHA)
        x["params"].copy_(backup)
        return (x["params"],)

    return Split(
        operator="undo_",
        shape=f"{tensors} x [{P // tensors}]",
        dtype=FLOAT32,
        variant="dampen_ and undo_, all selected in 5 % of the tensors",
        inputs=lambda g: _clustered(P, tensors, g),
        overwritten=("params",),
        ours=ours,
        exact=lambda x: (x["params"],),
        rivals={"a copy, dampen_, copied back": backed_up},
        cost=Cost("f and r read twice; p read and written twice where a value is selected", bytes=int(P * 16.8)),
        tensors=tensors,
    )


def percentile(P: int) -> Case:
    q = 99.5

    def by_numpy(x: Inputs) -> Results:
        """What forks do: every ratio in one array."""
        ratios = (x["forget"] / x["reference"]).numpy()
        return (torch.tensor([np.percentile(ratios[np.isfinite(ratios)], q)], dtype=FLOAT32),)

    def by_sort(x: Inputs) -> Results:
        ratios = x["forget"] / x["reference"]
        ordered = ratios[ratios.isfinite()].sort().values
        rank = (len(ordered) - 1) * (q / 100)
        below, above = ordered[int(rank) : int(rank) + 2].double()
        return (torch.lerp(below, above, rank % 1).float().view(1),)

    return Case(
        operator="alpha_for_percentile",
        shape=f"[{P}]",
        dtype=FLOAT32,
        inputs=lambda g: _importances(P, 0.25, FLOAT32, g, params=False),
        ours=lambda x: (torch.tensor([unlearn_fast.alpha_for_percentile([x["forget"]], [x["reference"]], q)]),),
        exact=lambda x: (torch.tensor([reference.alpha_for_percentile([x["forget"]], [x["reference"]], q)]),),
        rivals={"numpy.percentile": by_numpy, "torch.sort": by_sort},
        cost=Cost("f and r read twice", bytes=16 * P),
    )


def curve(P: int, *, alphas: int) -> Case:
    grid = [0.1 * 1.05**k for k in range(alphas)]

    def one_by_one(x: Inputs) -> Results:
        f, r = x["forget"], x["reference"]
        return (torch.stack([(f > r * alpha).sum() for alpha in grid]).float(),)

    return Case(
        operator="selection_curve",
        shape=f"[{P}], {alphas} alphas",
        dtype=FLOAT32,
        inputs=lambda g: _importances(P, 0.25, FLOAT32, g, params=False),
        ours=lambda x: (unlearn_fast.selection_curve([x["forget"]], [x["reference"]], grid).counts[0].float(),),
        exact=lambda x: (reference.selection_curve([x["forget"]], [x["reference"]], grid).counts[0].float(),),
        rivals={
            "one comparison an alpha": one_by_one,
            "torch.compile": lambda x: (_curve(x["forget"], x["reference"], tuple(grid)).float(),),
        },
        cost=Cost("f and r read", bytes=8 * P),
    )


@compiled
def _curve(f: Tensor, r: Tensor, grid: tuple[float, ...]) -> Tensor:
    return torch.stack([(f > r * alpha).sum() for alpha in grid])


def mask(P: int) -> Case:
    fraction = 0.5

    def by_argsort(x: Inputs) -> Results:
        """SalUn's released code: the ranks of all scores, and those below the count."""
        scores = x["scores"]
        ranks = torch.argsort(torch.argsort(-scores))
        return ((ranks < int(len(scores) * fraction)).float(),)

    def by_topk(x: Inputs) -> Results:
        scores = x["scores"]
        marked = torch.zeros(len(scores))
        marked[scores.topk(int(len(scores) * fraction), sorted=False).indices] = 1
        return (marked,)

    return Case(
        operator="top_fraction_mask",
        shape=f"[{P}]",
        dtype=FLOAT32,
        inputs=lambda g: {"scores": torch.randperm(P, generator=g).float()},  # distinct up to 2^24
        ours=lambda x: (unlearn_fast.top_fraction_mask([x["scores"]], fraction)[0].float(),),
        exact=lambda x: (reference.top_fraction_mask([x["scores"]], fraction)[0].float(),),
        rivals={"argsort twice": by_argsort, "torch.topk": by_topk},
        cost=Cost("the scores read three times, the mask written", bytes=13 * P),
    )


def sweep(*, width: int, image: int, points: int) -> Case:
    """A ResNet-18 dampened with points^2 pairs (alpha, lam); all that is evaluated is a sum over two layers."""
    grid = {"alpha": [5.0 * 1.3**k for k in range(points)], "lam": [0.2 + 0.2 * k for k in range(points)]}

    def inputs(g: torch.Generator) -> Inputs:
        model = models.resnet18(width, image)
        named = dict(model.named_parameters())
        importances = {n: _importances(p.numel(), 0.02, FLOAT32, g) for n, p in named.items()}
        sides = {s: {n: i[s].view_as(named[n]) for n, i in importances.items()} for s in ("forget", "reference")}
        sides["forget"] = {n: f.mul_(grid["alpha"][0] / ALPHA) for n, f in sides["forget"].items()}
        return {"model": model, **sides}

    def ours(x: Inputs) -> Results:
        table = unlearn_fast.sweep(x["model"], x["forget"], x["reference"], grid, _score, progress=False)
        return (torch.tensor([row["score"] for row in table.rows]),)

    def released(x: Inputs) -> Results:
        """A copy of the model for every point, as the released scripts make."""
        scores = []
        for alpha, lam in itertools.product(*grid.values()):
            model = copy.deepcopy(x["model"])
            with torch.no_grad():
                for name, p in model.named_parameters():
                    rivals.released_dampen_(p, x["forget"][name], x["reference"][name], alpha=alpha, lam=lam)
            scores.append(_score(model))
        return (torch.tensor(scores),)

    return Case(
        operator="sweep",
        shape=f"ResNet-18 width {width}, {points}x{points} points",
        dtype=FLOAT32,
        inputs=inputs,
        ours=ours,
        exact=released,
        rivals={"released loop, a copy a point": released},
        cost=Cost("f and r read for each alpha", bytes=8 * points * (11_173_962 * width * width // 64**2)),
    )


def _score(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(p.abs().sum()) for p in itertools.islice(model.parameters(), 2))


def _importances(P: int, share: float, dtype: torch.dtype, generator: torch.Generator, params: bool = True) -> Inputs:
    """f / r is uniform around the threshold, with `share` above it."""
    reference, ratio = (torch.rand(P, generator=generator, device=generator.device) for _ in range(2))
    reference, ratio = reference.add_(0.1), ratio.add_(ALPHA - 1 + share)
    importances = {"forget": ratio.mul_(reference), "reference": reference}
    return {"params": normal(generator, P, dtype=dtype), **importances} if params else importances


def _clustered(P: int, tensors: int, generator: torch.Generator) -> Inputs:
    """f / r is uniform between 0 and 1, but up to 4 in every twentieth part."""
    inputs = _importances(P, 0.0, FLOAT32, generator)
    pairs = zip(inputs["forget"].chunk(tensors), inputs["reference"].chunk(tensors), strict=True)
    for i, (f, r) in enumerate(pairs):
        f.sub_(r).mul_(4 if i % 20 == 0 else 1)
    return inputs


def _ours(p: list[Tensor], f: list[Tensor], r: list[Tensor], *, alpha: float, lam: float = 1.0) -> None:
    unlearn_fast.dampen_(p, f, r, alpha=alpha, lam=lam)


def _operator(p: list[Tensor], f: list[Tensor], r: list[Tensor], *, alpha: float, lam: float) -> None:
    torch.ops.unlearn_fast.dampen_(p, f, r, [alpha] * len(p), [lam] * len(p), 1.0, 1.0, 0.0)


def _each(function: Dampen) -> Dampen:
    """One tensor after the other."""

    def run(p: list[Tensor], f: list[Tensor], r: list[Tensor], **settings: float) -> None:
        for tensors in zip(p, f, r, strict=True):
            function(*tensors, **settings)

    return run


def _one(function: Dampen) -> Run:
    def run(x: Inputs) -> Results:
        function([x["params"]], [x["forget"]], [x["reference"]], alpha=ALPHA, lam=1.0)
        return (x["params"],)

    return run


def _parts(function: Dampen) -> Run:
    def run(x: Inputs) -> Results:
        function(*_of_parts(x), alpha=ALPHA, lam=1.0)
        return (x["params"],)

    return run


def _of_parts(x: Inputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return x["params in parts"], x["forget in parts"], x["reference in parts"]
