"""potion_: its tries, where it stops, and that the model is as before where none is enough."""

import math
import re
import warnings

import pytest
from importances import clones, mixed_model, of_model, same
from torch import Tensor, nn

from unlearn_fast import Importance, UndoLog, alpha_for_percentile, dampen_, potion_, undo_
from unlearn_fast.assd import percentile
from unlearn_fast.fisher.importance import model_fingerprint

NAN = math.nan


def values(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def ready(model: nn.Module) -> dict[str, Importance]:
    """Of 30 forgotten and 70 retained examples."""
    facts = {"batches": 1, "mode": "per_example", "fingerprint": model_fingerprint(model)}
    sets = zip(("forget", "reference"), of_model(model), (30, 70), strict=True)
    return {name: Importance(tensors, examples=n, **facts) for name, tensors, n in sets}


def norm(model: nn.Module) -> float:
    return sum(p.detach().double().abs().sum().item() for p in model.parameters())


@pytest.mark.parametrize("share", [None, 0.2, 1.0, 1])
def test_every_try_dampens_the_original_with_the_next_share(share):
    model = mixed_model()
    given, before, seen = ready(model), clones(values(model)), []

    def score(model: nn.Module) -> float:
        seen.append(clones(values(model)))
        return 10.0 - len(seen)

    report = potion_(
        model, **given, forget_score=score, below=5.0, share=share, lam=0.3, exponent=2.0, cap=0.8, floor=0.1,
        undo=True, progress=False,
    )  # fmt: skip
    assert len(seen) == 6  # 9, 8, 7, 6, 5 are not below 5
    f, r = given.values()
    for k, found in enumerate(seen):
        alpha = alpha_for_percentile(f, r, 100 - math.log(1 + 100 * min(1, (share or 0.3) / 25 * 1.1**k)))
        twin = mixed_model()
        wanted = dampen_(twin, f, r, alpha=alpha, lam=0.3, exponent=2.0, cap=0.8, floor=0.1)
        assert same(found, values(twin))
    assert same(values(model), seen[-1]) and report.total == wanted.total and set(report.alpha) == {alpha}
    undo_(report.undo)
    assert same(values(model), before)


def test_the_first_score_below_is_enough():
    model = mixed_model()
    start, scores = norm(model), []

    def score(model: nn.Module) -> float:
        scores.append(norm(model))
        return scores[-1]

    potion_(model, **ready(model), forget_score=score, below=start * 0.99, progress=False)
    assert scores[-1] < start * 0.99 and all(score >= start * 0.99 for score in scores[:-1]) and len(scores) > 3
    assert scores == sorted(scores, reverse=True) and norm(model) == scores[-1]


def test_undo_of_potion(case):
    """False: none; a log that has something already: both are undone."""
    model, f, r = case
    given, log = ready(model), UndoLog()
    dampen_(model, f, r, alpha=3.0, undo=log)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*measured on other weights")
        tries = iter((3.0, 2.0, 1.0))
        report = potion_(model, **given, forget_score=lambda m: next(tries), below=1.5, undo=log, progress=False)
        assert report.undo is log and len(log.names) == 2 * len(report.names)
        undo_(log)
        own = UndoLog()
        assert potion_(model, **given, forget_score=norm, below=math.inf, undo=own, progress=False).undo is own
        undo_(own)
        with pytest.raises(RuntimeError):
            potion_(model, **given, forget_score=norm, below=0, tries=3, undo=own, progress=False)
        assert own.names == ()


def test_without_undo_potion_keeps_nothing():
    model = mixed_model()
    report = potion_(model, **ready(model), forget_score=lambda m: 0.0, below=1.0, progress=False)
    assert report.undo is None and report.total.selected > 0


@pytest.mark.parametrize("score", [1.0, NAN], ids=str)
def test_no_try_is_enough(case, score):
    model, _, _ = case
    calls = []
    with pytest.raises(
        RuntimeError, match=rf"still {score:g}, not below 1, after 7 tries, the last with share 0\.02126"
    ):
        potion_(
            model, **ready(model), forget_score=lambda m: calls.append(1) or score, below=1.0, tries=7, progress=False
        )
    assert len(calls) == 7


def test_the_share_ends_at_one(case):
    """1 / 25 * 1.1^34 is the first above 1."""
    model, _, _ = case
    with pytest.raises(RuntimeError, match="after 35 tries, the last with share 1: the model is as it was"):
        potion_(model, **ready(model), forget_score=lambda m: 1.0, below=1.0, share=1.0, progress=False)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_the_model_is_as_before_when_the_score_fails(case, error):
    model, _, _ = case
    scores = iter((3.0, 2.0))

    def fails(model: nn.Module) -> float:
        for value in scores:
            return value
        raise error

    with pytest.raises(error):
        potion_(model, **ready(model), forget_score=fails, below=1.0, progress=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"forget_score": 1.0}, TypeError, "forget_score is a float: it must be a function of the model"),
        ({"below": "x"}, TypeError, "below is 'x': it must be a number"),
        ({"below": NAN}, ValueError, "below is nan: it must be"),
        ({"tries": 0}, ValueError, "tries is 0: it must be a whole number, at least 1"),
        ({"tries": 2.0}, ValueError, "tries is 2.0: it must be a whole number, at least 1"),
        ({"tries": True}, ValueError, "tries is True: it must be a whole number, at least 1"),
        ({"share": 1.5}, ValueError, "share is 1.5: it must be between 0 and 1"),
        ({"share": -0.5}, ValueError, "share is -0.5: it must be between 0 and 1"),
        ({"undo": "yes"}, TypeError, "undo is a str: it must be True, False or an UndoLog"),
        ({"floor": 2.0}, ValueError, "floor is 2.0 and cap 1.0"),
        ({"lam": -1.0}, ValueError, "lam is -1.0: it must be >= 0"),
        ({"forget": []}, TypeError, "losses is missing: it must be given where forget is batches"),
        ({"forget_score": lambda m: None}, TypeError, "forget_score returned None: it must be a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_potion(case, change, error, message):
    model, _, _ = case
    arguments = {**ready(model), "forget_score": norm, "below": 1.0, "progress": False}
    with pytest.raises(error, match=re.escape(message)):
        potion_(model, **{**arguments, **change})


def test_percentile_of_a_share():
    assert percentile(0.0) == 100 and percentile(1.0) == 100 - math.log(101)
