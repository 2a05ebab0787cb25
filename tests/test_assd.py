"""assd_: the published percentile, from batches and from ready importances."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from importances import clones, mixed_model, of_model, same
from torch import Tensor, nn

from unlearn_fast import Importance, UndoLog, assd_, classification_losses, dampen_, diagonal_fisher, undo_
from unlearn_fast.fisher.importance import model_fingerprint

NAN = math.nan


def ready(model: nn.Module, forgotten: int = 30, retained: int = 70) -> dict[str, Importance]:
    facts = {"batches": 1, "mode": "per_example", "fingerprint": model_fingerprint(model)}
    sets = zip(("forget", "reference"), of_model(model), (forgotten, retained), strict=True)
    return {name: Importance(tensors, examples=n, **facts) for name, tensors, n in sets}


def percentile_by_hand(f: Importance, r: Importance, share: float) -> float:
    """Of the paper: ln(1 + 100 share) percent of the ratios lie above."""
    with np.errstate(all="ignore"):
        ratios = np.concatenate([(f[name].numpy() / r[name].numpy()).ravel() for name in f])
    return float(np.percentile(ratios[np.isfinite(ratios)].astype(np.float64), 100 - math.log(1 + 100 * share)))


def batches(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    return list(zip(x.split(4), y.split(4), strict=True))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(("share", "used"), [(None, 0.3), (0.01, 0.01), (0.5, 0.5), (1, 1.0), (0.2, 0.2)])
def test_alpha_is_the_percentile_and_lam_is_one(share, used):
    model, twin = mixed_model(), mixed_model()
    given, before = ready(model), clones(list(model.parameters()))
    report = assd_(model, **given, share=share, undo=True)
    alpha = percentile_by_hand(*given.values(), used)
    wanted = dampen_(twin, *given.values(), alpha=alpha, lam=1.0)
    assert set(report.alpha) == {alpha} and set(report.lam) == {1.0} and report.total == wanted.total
    assert report.total.share == pytest.approx(math.log(1 + 100 * used) / 100, abs=2e-3)
    assert same(list(model.parameters()), list(twin.parameters()))
    undo_(report.undo)
    assert same(list(model.parameters()), before)


def test_settings_reach_the_dampening():
    model, twin = mixed_model(), mixed_model()
    given, log = ready(model), UndoLog()
    rest = {"lam": 0.3, "exponent": 2.0, "cap": 0.9, "floor": 0.2}
    report = assd_(model, **given, share=0.5, undo=log, **rest)
    dampen_(twin, *given.values(), alpha=percentile_by_hand(*given.values(), 0.5), **rest)
    assert same(list(model.parameters()), list(twin.parameters())) and report.undo is log and len(log.names) > 0


def test_importances_are_measured_where_batches_are_given():
    """And the share is that of their examples: 4 of 20."""
    model, twin = classifier(), classifier()
    forget, rest = batches(4, seed=1), batches(16, seed=2)
    report = assd_(model, forget=forget, reference=rest, losses=classification_losses, progress=False)
    f, r = (diagonal_fisher(twin, x, classification_losses, progress=False) for x in (forget, rest))
    alpha = percentile_by_hand(f, r, 0.2)
    dampen_(twin, f, r, alpha=alpha)
    assert set(report.alpha) == {alpha} and report.total.selected > 0
    assert same(list(model.parameters()), list(twin.parameters()))


def test_nothing_selected_is_warned_of():
    """A share of 0 is the largest ratio."""
    model = classifier()
    names = dict(model.named_parameters())
    facts = {"batches": 1, "mode": "per_example", "fingerprint": model_fingerprint(model), "examples": 5}
    sides = [Importance({n: torch.full(p.shape, v) for n, p in names.items()}, **facts) for v in (2.0, 1.0)]
    with pytest.warns(UserWarning, match="nothing was selected: no ratio f / r is above the percentile 2") as caught:
        report = assd_(model, forget=sides[0], reference=sides[1], share=0.0)
    assert report.total.selected == 0 and caught[0].filename == __file__
    assert same(list(model.parameters()), list(classifier().parameters()))


def test_importances_of_other_weights_are_warned_of():
    model, other = mixed_model(), mixed_model()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    given = ready(other) | {"reference": ready(model)["reference"]}
    with pytest.warns(UserWarning, match="forget: these importances were measured on other weights") as caught:
        assd_(model, **given)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assd_(mixed_model(), **ready(mixed_model()))


def zero(importance: Importance) -> Importance:
    facts = {"batches": 1, "mode": "per_example", "fingerprint": importance.fingerprint, "examples": 7}
    return Importance({name: torch.zeros_like(t) for name, t in importance.items()}, **facts)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"share": -0.1}, ValueError, "share is -0.1: it must be between 0 and 1"),
        ({"share": 1.1}, ValueError, "share is 1.1: it must be between 0 and 1"),
        ({"share": NAN}, ValueError, "share is nan: it must be between 0 and 1"),
        ({"share": "half"}, TypeError, "share is 'half': it must be a number"),
        ({"lam": -1.0}, ValueError, "lam is -1.0: it must be >= 0"),
        ({"floor": 2.0}, ValueError, "floor is 2.0 and cap 1.0: floor must not be above cap"),
        ({"exponent": 0}, ValueError, "exponent is 0: it must be > 0"),
        ({"undo": "yes"}, TypeError, "undo is a str: it must be True, False or an UndoLog"),
        ({"forget": []}, TypeError, "losses is missing: it must be given where forget is batches"),
        (
            {"reference": zero(ready(mixed_model())["reference"])},
            ValueError,
            "forget and reference have no finite ratio",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_leave_the_model_unchanged(change, error, message):
    model = mixed_model()
    before = clones(list(model.parameters()))
    with pytest.raises(error, match=re.escape(message)):
        assd_(model, **{**ready(model), **change})
    assert same(list(model.parameters()), before)
