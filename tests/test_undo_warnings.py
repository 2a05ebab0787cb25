"""When undoing a dampening warns that a parameter was changed since, and that it puts back all the same."""

import warnings

import pytest
import torch
from importances import ALPHA, selects_all
from torch import Tensor, nn

from unlearn_fast import UndoLog, dampen_, trial, undo_
from unlearn_fast.ops import dampen as module


def changes(p: Tensor) -> None:
    with torch.no_grad():
        p[0] = 7.0


@pytest.mark.parametrize("dampenings", [1, 2])
def test_a_change_since_is_warned_of_and_kept_elsewhere(dampenings):
    params = {"a": torch.full((3,), 8.0), "b": torch.full((3,), 8.0)}
    f = {"a": torch.tensor([0.0, 4.0, 4.0]), "b": torch.full((3,), 4.0)}
    r = {name: torch.ones(3) for name in params}
    log = UndoLog()
    for _ in range(dampenings):
        dampen_(params, f, r, alpha=ALPHA, undo=log)
    changes(params["a"])
    with pytest.warns(UserWarning, match=r"'a' \(of 1 parameters\) was changed since") as caught:
        undo_(log)
    assert params["a"].tolist() == [7.0, 8.0, 8.0] and params["b"].tolist() == [8.0] * 3
    assert caught[0].filename == __file__


def test_a_change_between_two_dampenings_is_warned_of():
    p, log = torch.ones(3), UndoLog()
    dampen_([p], *selects_all(p), alpha=ALPHA, undo=log)
    changes(p)
    dampen_([p], *selects_all(p), alpha=ALPHA, undo=log)
    with pytest.warns(UserWarning, match="was changed since"):
        undo_(log)


def test_views_of_one_tensor_are_no_change(monkeypatch):
    """They share a version counter: to dampen one is not to change the other."""
    monkeypatch.setattr(module, "SEGMENT", 4)
    whole, log = torch.full((12,), 8.0), UndoLog()
    params = list(whole.split(4))
    dampen_(params, *selects_all(*params), alpha=ALPHA, undo=log)
    dampen_(params[:1], *selects_all(params[0]), alpha=ALPHA, undo=log)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undo_(log)
    assert whole.eq(8).all()


@pytest.mark.parametrize("how", ["undo_", "trial"])
def test_all_is_put_back_where_warnings_are_errors(how):
    p = torch.full((3,), 8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was changed since"):
            if how == "trial":
                with trial([p], *selects_all(p), alpha=ALPHA):
                    changes(p)
            else:
                report = dampen_([p], *selects_all(p), alpha=ALPHA, undo=True)
                changes(p)
                undo_(report.undo)
    assert p.eq(8).all()


def test_one_parameter_under_two_names_is_no_change():
    model, log = nn.Linear(3, 2), UndoLog()
    before = model.weight.detach().clone()
    f, r = selects_all(model.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dampen_({"weight": model.weight}, {"weight": f[0]}, {"weight": r[0]}, alpha=ALPHA, undo=log)
        dampen_([model.weight], f, r, alpha=ALPHA, undo=log)
        undo_(log)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("change", ["optimizer", "load_state_dict"])
def test_what_usually_changes_parameters(change):
    model = nn.Linear(3, 2, bias=False)
    report = dampen_([model.weight], *selects_all(model.weight), alpha=ALPHA, undo=True)
    if change == "optimizer":
        model(torch.ones(3)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    else:
        model.load_state_dict({"weight": torch.ones(2, 3)})
    with pytest.warns(UserWarning, match=r"'0' \(of 1 parameters\) was changed since"):
        undo_(report.undo)


def test_an_undone_log_starts_anew():
    p, log = torch.full((3,), 8.0), UndoLog()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            dampen_([p], *selects_all(p), alpha=ALPHA, undo=log)
            undo_(log)
            changes(p)
    undo_(log)
    assert p.tolist() == [7.0, 8.0, 8.0]
