"""SSD on a ResNet-18 that reads handwritten digits: one digit is dampened away, without training.

Compared with the model before, with the released code's approximation of the importances, and with a model retrained
from scratch without the digit.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from unlearn_fast import DampenReport, Importance, classification_losses, diagonal_fisher, ssd_
from unlearn_fast.demo.evaluation import accuracy, membership_inference, predict, target
from unlearn_fast.demo.resnet import ResNet18

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Chosen on seeds 1 to 4, forgetting 7, 3, 0 and 5; shown is seed 0, forgetting 8.

    Tried: label smoothing 0 and 0.1; reference importance of the retained and of the full set; alpha from 0.3 to 1000.
    With exact importances and the retained set, alpha = 5, 10, 20 and 50 met both targets on all four seeds; 10 is the
    published value. With the released approximation, alpha up to 50 lost 5 to 89 points on the retained digits, and
    only 200 met them on all four, so both are shown. Over the full set the digit is a tenth of the examples, so that
    r >= f / 10 for every parameter, and from alpha = 10 on nothing could be selected: hence the retained set.
    Without smoothing no alpha worked on all four seeds: a network that fits every example perfectly has gradients near
    zero but for a few hard examples, and these alone decide what is selected.
    """

    width: int = 32  # channels of the first stage; 64 is the full ResNet-18, at four times the cost
    epochs: int = 10
    smoothing: float = 0.1
    alpha: float = 10.0
    released_alpha: float = 200.0
    lam: float = 1.0
    digit: int = 8
    seed: int = 0
    batch: int = 64
    lr: float = 0.1


QUICK = Settings(width=8, epochs=6)


@dataclass(frozen=True)
class Split:
    """Images [N, 1, 8, 8] in [0, 1] and their digits."""

    x: Tensor
    y: Tensor

    def where(self, mask: Tensor) -> "Split":
        return Split(self.x[mask], self.y[mask])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


@dataclass(frozen=True)
class Digits:
    """The handwritten digits of scikit-learn, three quarters of them for training, split by the forgotten digit."""

    retain: Split
    forget: Split
    retain_test: Split
    forget_test: Split

    @classmethod
    def load(cls, digit: int, generator: torch.Generator) -> "Digits":
        from sklearn.datasets import load_digits

        raw = load_digits()
        order = torch.randperm(len(raw.target), generator=generator)
        x = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)[order]
        y = torch.from_numpy(raw.target).long()[order]
        cut = len(y) * 3 // 4
        train, test = Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:])
        return cls(
            train.where(train.y != digit),
            train.where(train.y == digit),
            test.where(test.y != digit),
            test.where(test.y == digit),
        )


def run(settings: Settings, show_progress: bool = True) -> dict[str, Any]:
    """Trains, forgets, retrains, measures. Changes the global random state: `demo.main` forks it."""
    torch.manual_seed(settings.seed)
    data = Digits.load(settings.digit, torch.Generator().manual_seed(settings.seed))
    everything = Split(torch.cat([data.retain.x, data.forget.x]), torch.cat([data.retain.y, data.forget.y]))
    seconds: dict[str, float] = {}

    model, seconds["training"] = _timed(lambda: train(everything, settings, "training", show_progress))
    models = {"before": measure(model, data)}
    layers: dict[str, float] = {}
    share: dict[str, float] = {}
    for name, mode, alphas in (
        ("exact", "per_example", {"ssd": settings.alpha}),
        ("released", "batch", {"released": settings.alpha, "released_tuned": settings.released_alpha}),
    ):
        (forget, reference), seconds[f"importance_{name}"] = _timed(
            partial(importances, model, data, settings, mode, show_progress)
        )
        for row, alpha in alphas.items():
            forgetting = copy.deepcopy(model)
            report, seconds[f"dampening_{row}"] = _timed(
                partial(ssd_, forgetting, forget=forget, reference=reference, alpha=alpha, lam=settings.lam)
            )
            models[row], share[row] = measure(forgetting, data), report.total.share
            layers = layers or share_by_layer(report)
    retrained, seconds["retraining"] = _timed(lambda: train(data.retain, settings, "retraining", show_progress))
    models["retrained"] = measure(retrained, data)

    before, after = models["before"], models["ssd"]
    return {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": {name: len(getattr(data, name).y) for name in ("retain", "forget", "retain_test", "forget_test")},
        "models": models,
        "seconds": seconds,
        "dampened": {"share": share, "layers": layers},
        "targets": [
            target("accuracy on the forgotten digit", after["forgotten"], 0.1, at_most=True),
            target(
                "points of accuracy lost on the other digits",
                before["retained"] - after["retained"],
                0.02,
                at_most=True,
            ),
        ],
    }


def importances(model: nn.Module, data: Digits, settings: Settings, mode: str, show_progress: bool) -> list[Importance]:
    """Of the forgotten digit, and of the retained ones."""
    return [
        diagonal_fisher(model, part.batches(settings.batch), classification_losses, mode=mode, progress=show_progress)
        for part in (data.forget, data.retain)
    ]


def train(data: Split, settings: Settings, title: str, show_progress: bool) -> nn.Module:
    """A ResNet-18 trained from scratch by SGD with momentum under a one-cycle schedule."""
    model = ResNet18(settings.width)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = settings.epochs * (len(data.y) // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc=title, unit="step", disable=not show_progress, leave=False) as bar:
        for _ in range(settings.epochs):
            # A last batch smaller than the others is left out: BatchNorm's statistics of a few examples are noise.
            for rows in torch.randperm(len(data.y)).split(settings.batch)[: len(data.y) // settings.batch]:
                optimizer.zero_grad()
                logits = model(data.x[rows])
                nn.functional.cross_entropy(logits, data.y[rows], label_smoothing=settings.smoothing).backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model


def measure(model: nn.Module, data: Digits) -> dict[str, float]:
    """Test accuracy on the retained digits and on the forgotten one, and membership inference."""
    parts = {name: predict(model, getattr(data, name).x) for name in ("retain", "forget", "retain_test", "forget_test")}
    test = torch.cat([parts["retain_test"], parts["forget_test"]])
    return {
        "retained": accuracy(parts["retain_test"], data.retain_test.y),
        "forgotten": accuracy(parts["forget_test"], data.forget_test.y),
        "membership": membership_inference(parts["retain"], test, parts["forget"]),
    }


def share_by_layer(report: DampenReport) -> dict[str, float]:
    """Layer -> share of its values that were dampened; weight and bias of a layer together."""
    totals: dict[str, list[int]] = {}
    for name, counts in report.parameters.items():
        total = totals.setdefault(name.rpartition(".")[0], [0, 0])
        total[0] += counts.selected
        total[1] += counts.elements
    return {layer: selected / elements for layer, (selected, elements) in totals.items()}


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
