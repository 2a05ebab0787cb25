"""trial and sweep: what they evaluate, and that the model is as before, however they end."""

import csv
import math
import re
import warnings

import pytest
import torch
from importances import clones, mixed_model, same
from torch import Tensor, nn

from unlearn_fast import Sweep, dampen_, sweep, trial
from unlearn_fast.ops import dampen as dampen_module
from unlearn_fast.ops.dampen.selected import Selected

NAN = math.nan


def values(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


# trial


def test_a_trial_dampens_and_puts_back(case):
    model, f, r = case
    twin = mixed_model()
    wanted = dampen_(twin, f, r, alpha={"": 2.0, "head": 1.0}, lam=0.3, floor=0.1)
    with trial(model, f, r, alpha={"": 2.0, "head": 1.0}, lam=0.3, floor=0.1) as report:
        assert same(values(model), values(twin)) and report.total == wanted.total


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_a_trial_puts_back_after_any_error(case, error):
    model, f, r = case
    with pytest.raises(error), trial(model, f, r, alpha=1.0) as report:
        assert report.total.selected > 0
        raise error


def test_trials_nest(case):
    """The outer one cannot know that what the inner one changed has been put back."""
    model, f, r = case
    with pytest.warns(UserWarning, match="was changed since"), trial(model, f, r, alpha=1.0):
        first = clones(values(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with trial(model, f, r, alpha=0.5, lam=0.1):
                assert not same(values(model), first)
        assert same(values(model), first)


def test_a_trial_whose_block_changes_a_parameter_warns_where_it_is_written():
    p = torch.full((2,), 8.0)
    with (
        pytest.warns(UserWarning, match=r"'0' \(of 1 parameters\) was changed since") as caught,
        trial([p], [torch.tensor([4.0, 0.0])], [torch.ones(2)], alpha=1.0),
    ):
        p += 1
    assert p.tolist() == [8.0, 9.0] and caught[0].filename == __file__


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, TypeError, "alpha"),
        ({"alpha": -1.0}, ValueError, "alpha is -1.0: it must be >= 0"),
        ({"alpha": 1.0, "undo": True}, TypeError, "undo is not for trial, which always undoes: leave it out"),
        ({"alpha": 1.0, "beta": 2.0}, TypeError, "beta"),
        ({"alpha": {"other": 1.0}}, ValueError, "alpha has 'other'"),
    ],
    ids=str,
)
def test_a_trial_with_wrong_settings(case, settings, error, message):
    model, f, r = case
    with pytest.raises(error, match=message), trial(model, f, r, **settings):
        pytest.fail("the block ran")


# sweep


def evaluate(model: nn.Module) -> dict[str, float]:
    """Of every bit."""
    return {"sum": sum(p.double().abs().sum().item() for p in model.parameters()), "zero": torch.zeros(())}


@pytest.mark.parametrize(
    "grid",
    [
        {"alpha": [2.0, 1, 3.9], "lam": [1.0, 0.1]},
        [(2.0, 1.0), (1, 0.5), (2.0, 1.0), [0.0, 0.0], (5.0, 1.0), (2.0, 0.0)],
        {"lam": (0.5,), "alpha": iter((3.0, 0.5))},
        zip((1.0, 0.5), (0.3, 0.3), strict=True),
        [],
    ],
    ids=["product", "pairs with repetitions", "iterators", "zip", "empty"],
)
def test_rows_are_those_of_separate_dampenings(case, grid):
    model, f, r = case
    grid = list(grid) if not isinstance(grid, dict) else {name: list(column) for name, column in grid.items()}
    points = grid if isinstance(grid, list) else [(a, b) for a in grid["alpha"] for b in grid["lam"]]
    rest = {"exponent": 2.0, "cap": 0.9, "floor": 0.05}
    found = sweep(model, f, r, iter(grid) if isinstance(grid, list) else grid, evaluate, progress=False, **rest)
    assert len(found.rows) == len(points)
    for row, (alpha, lam) in zip(found.rows, points, strict=True):
        twin = mixed_model()
        report = dampen_(twin, f, r, alpha=alpha, lam=lam, **rest).total
        assert list(row) == ["alpha", "lam", "selected", "share", "mean_factor", "sum", "zero"]
        assert (row["alpha"], row["lam"], row["selected"], row["share"]) == (alpha, lam, report.selected, report.share)
        assert row["mean_factor"] == pytest.approx(report.mean_factor, rel=1e-12, nan_ok=True)
        assert row["sum"] == evaluate(twin)["sum"] and row["zero"] == 0.0


def test_one_value_is_called_score(case):
    model, f, r = case
    found = sweep(model, f, r, [(1.0, 1.0)], lambda m: torch.tensor(0.5), progress=False)
    assert found.scores == ("score",) and found.rows[0]["score"] == 0.5


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_the_model_is_as_before_when_evaluate_fails(case, error, at):
    model, f, r = case
    calls = []

    def fails(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == at:
            raise error
        return 0.0

    with pytest.raises(error):
        sweep(model, f, r, {"alpha": [1.0, 0.5], "lam": [1.0, 0.5]}, fails, progress=False)


def test_no_memory_of_a_parameters_size_is_taken_where_nothing_is_selected():
    model = nn.Linear(1000, 1000)
    f, r = ({n: torch.full_like(p, v) for n, p in model.named_parameters()} for v in (1.0, 1.0))
    with torch.profiler.profile(profile_memory=True) as profiled:
        found = sweep(model, f, r, {"alpha": [1.0, 2.0], "lam": [1.0, 0.5]}, lambda m: 0.0, progress=False)
    taken = [event.cpu_memory_usage for event in profiled.events()]
    assert found.rows[0]["selected"] == 0 and taken and max(taken) < 10_000


@pytest.mark.parametrize("how", ["trial", "sweep"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_of_the_dampening_itself(case, monkeypatch, how, when):
    """In the second of the calls that write: of a trial's second segment, of a sweep's second point."""
    model, f, r = case
    place, name = (dampen_module, "apply_") if how == "trial" else (Selected, "dampen_")
    calls, edit_ = [], getattr(place, name)

    def interrupted(*arguments):
        calls.append(1)
        table = edit_(*arguments) if len(calls) == 1 or when == "after" else None
        if len(calls) == 2:
            raise KeyboardInterrupt
        return table

    monkeypatch.setattr(place, name, interrupted)
    monkeypatch.setattr(dampen_module, "SEGMENT", 100)
    with pytest.raises(KeyboardInterrupt):
        if how == "sweep":
            sweep(model, f, r, {"alpha": [1.0], "lam": [0.5, 0.1]}, lambda m: 0.0, progress=False)
        else:
            with trial(model, f, r, alpha=1.0):
                pytest.fail("the block ran")
    assert len(calls) == 2


def test_in_inference_mode(case):
    model, f, r = case
    with torch.inference_mode():
        with trial(model, f, r, alpha=1.0) as report:
            assert report.total.selected > 0
        assert sweep(model, f, r, [(1.0, 1.0)], lambda m: 0.0, progress=False).rows[0]["selected"] > 0


@pytest.mark.parametrize("progress", [True, False])
def test_progress(case, progress, capfd):
    model, f, r = case
    sweep(model, f, r, [(1.0, 1.0)], lambda m: 0.0, progress=progress)
    out, err = capfd.readouterr()
    assert out == "" and ("sweep" in err) == progress


@pytest.mark.parametrize(
    ("grid", "returned", "error", "message"),
    [
        (1.0, 0.0, TypeError, "grid is a float: it must be pairs (alpha, lam), or a mapping of both"),
        ("ab", 0.0, TypeError, "grid is a str: it must be pairs (alpha, lam), or a mapping of both"),
        ([1.0], 0.0, ValueError, "grid has 1.0: it must be pairs (alpha, lam)"),
        ([(1.0,)], 0.0, ValueError, "grid has (1.0,): it must be pairs (alpha, lam)"),
        (["12"], 0.0, ValueError, "grid has '12': it must be pairs (alpha, lam)"),
        ({"alpha": [1.0]}, 0.0, ValueError, "grid has 'alpha': it must have 'alpha' and 'lam', and no others"),
        ({"alpha": [1.0], "lam": 1.0}, 0.0, TypeError, "grid['lam'] is a float: it must be a list of numbers"),
        ({"alpha": "12", "lam": [1.0]}, 0.0, TypeError, "grid['alpha'] is a str: it must be a list of numbers"),
        ([(1.0, 1.0), (-1.0, 1.0)], 0.0, ValueError, "alpha in grid is -1.0: it must be >= 0"),
        ([(1.0, 1.0), (1.0, NAN)], 0.0, ValueError, "lam in grid is nan: it must be >= 0"),
        ([(1.0, math.inf)], 0.0, ValueError, "lam is inf: it must be finite in float32"),
        ([({"": 1.0}, 1.0)], 0.0, TypeError, "alpha in grid is {'': 1.0}: it must be a number"),
        ([(1.0, "1")], 0.0, TypeError, "lam in grid is '1': it must be a number"),
        ([(1.0, 1.0)], {"alpha": 1.0}, ValueError, "evaluate returned 'alpha', which the table has already"),
        ([(1.0, 1.0)], None, TypeError, "evaluate returned None: it must be a number, or a mapping name -> number"),
        ([(1.0, 1.0)], {"a": "x"}, TypeError, "evaluate returned {'a': 'x'}: it must be a number, or a mapping"),
    ],
    ids=str,
)
def test_errors_of_grids_and_of_scores(case, grid, returned, error, message):
    model, f, r = case
    with pytest.raises(error, match=re.escape(message)):
        sweep(model, f, r, grid, lambda model: returned, progress=False)


def test_other_errors_of_a_sweep(case):
    model, f, r = case
    with pytest.raises(TypeError, match="evaluate is a float: it must be a function of the model"):
        sweep(model, f, r, [(1.0, 1.0)], 0.5, progress=False)
    with pytest.raises(ValueError, match=r"floor is 2\.0 and cap 1\.0"):
        sweep(model, f, r, [(1.0, 1.0)], evaluate, floor=2.0, progress=False)
    with pytest.raises(ValueError, match="forget has 'other'"):
        sweep(model, {"other": torch.ones(1)}, r, [(1.0, 1.0)], evaluate, progress=False)
    names = iter("ab")
    with pytest.raises(ValueError, match="evaluate returned the scores 'b', and at first 'a'"):
        sweep(model, f, r, [(1.0, 1.0), (2.0, 1.0)], lambda m: {next(names): 1.0}, progress=False)


# The table


def table(*pairs: tuple[float, float]) -> Sweep:
    rows = [{"alpha": float(k), "lam": 1.0, "selected": 3, "share": 0.5, "mean_factor": NAN} for k in range(len(pairs))]
    return Sweep(tuple({**row, "x": x, "y": y} for row, (x, y) in zip(rows, pairs, strict=True)))


@pytest.mark.parametrize(
    ("pairs", "best"),
    [
        ([(1.0, 1.0), (2.0, 2.0), (3.0, 1.5)], [0, 1]),
        ([(3.0, 9.0), (2.0, 2.0), (1.0, 2.0), (1.0, 1.0)], [2, 0]),
        ([(1.0, 5.0), (1.0, 5.0), (2.0, 5.0), (2.0, 6.0), (2.0, 6.0)], [0, 1, 3, 4]),  # equal rows do not beat
        ([(3.0, 3.0), (NAN, 9.0), (1.0, 1.0), (2.0, NAN), (NAN, NAN), (2.0, 2.0), (0.5, 0.0)], [6, 2, 5, 0]),
        ([(2.0, NAN), (1.0, NAN)], []),
        ([(-math.inf, 0.0), (0.0, math.inf), (math.inf, math.inf)], [0, 1]),
    ],
    ids=["plain", "unordered", "ties", "NaN", "only NaN", "infinities"],
)
def test_pareto(pairs, best):
    assert [int(row["alpha"]) for row in table(*pairs).pareto(low="x", high="y").rows] == best


def test_pareto_is_what_its_definition_says():
    generator = torch.Generator().manual_seed(0)
    pairs = [tuple(pair) for pair in torch.randint(0, 6, (40, 2), generator=generator).tolist()]
    found = {int(row["alpha"]) for row in table(*pairs).pareto(low="x", high="y").rows}
    beaten = {i for i, (x, y) in enumerate(pairs) if any((a < x and b >= y) or (b > y and a <= x) for a, b in pairs)}
    assert found == set(range(40)) - beaten


@pytest.mark.parametrize("name", ["z", "alpha", "share"])
def test_pareto_of_what_is_no_score(name):
    with pytest.raises(ValueError, match=f"'{name}' is no score: choose from 'x', 'y'"):
        table((1.0, 1.0)).pareto(low="x", high=name)


def test_csv_and_text(case, tmp_path):
    model, f, r = case
    found = sweep(model, f, r, {"alpha": [1.0, 99.0], "lam": [0.1]}, lambda m: {"vergessen, für": 0.1}, progress=False)
    found.to_csv(tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(found.rows[0]) and len(rows) == 2
    for written, row in zip(rows, found.rows, strict=True):
        assert {name: float(x) for name, x in written.items()} == pytest.approx(row, nan_ok=True, rel=0, abs=0)
    assert len(str(found).splitlines()) == 3 and "mean_factor" in str(found)
    Sweep(()).to_csv(tmp_path / "empty.csv")
    assert (tmp_path / "empty.csv").read_text().split() == ["alpha,lam,selected,share,mean_factor"]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    table((1.0, 2.0), (0.5, 1.0), (NAN, 1.0)).plot(tmp_path / "sweep.png", low="x", high="y")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
