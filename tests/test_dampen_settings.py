"""dampen_ with settings of each parameter, and with a floor: which one counts, what is refused, what is reported."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from accuracy import bits
from hypothesis import given
from hypothesis import strategies as st
from importances import clones, columns, many_tensors, same, triples
from torch import Tensor, nn

from unlearn_fast import dampen_, reference, ssd_

INF = math.inf
NAMES = ["model.embed", *(f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("attn", "mlp")), "head"]


def ratios_of_four(names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of 1, f / r = 4 everywhere."""
    ones, fours = ({name: torch.full((3,), value) for name in names} for value in (1.0, 4.0))
    return ones, fours, {name: torch.ones(3) for name in names}


def chosen(alpha: object, names: list[str] = NAMES, **settings: object) -> dict[str, float]:
    """The alpha of each name that has one."""
    report = dampen_(*ratios_of_four(names), alpha=alpha, **settings)
    assert set(report.left_out) == set(names) - set(report.names)
    return dict(zip(report.names, report.alpha, strict=True))


# Which setting counts


@pytest.mark.parametrize(
    ("key", "fits"),
    [
        ("", lambda name: True),
        ("head", lambda name: name == "head"),
        ("model", lambda name: name != "head"),
        ("model.layers", lambda name: "layers" in name),
        ("model.layers.1", lambda name: "layers.1." in name),  # not 10 and 11
        ("model.layers.1.mlp.weight", lambda name: name == "model.layers.1.mlp.weight"),
        ("model.layers[8:16]", lambda name: any(f"layers.{i}." in name for i in (8, 9, 10, 11))),
        ("model.layers[2:3]", lambda name: "layers.2." in name),
        ("model.layers[:2]", lambda name: any(f"layers.{i}." in name for i in (0, 1))),
        ("model.layers[10:]", lambda name: any(f"layers.{i}." in name for i in (10, 11))),
        ("model.layers[:]", lambda name: "layers" in name),
        ("model.layers[8:].mlp", lambda name: re.search(r"layers\.(8|9|10|11)\.mlp", name)),
        ("model.layers[0:1].mlp.weight", lambda name: name == "model.layers.0.mlp.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_key_fits(key, fits):
    assert chosen({key: 2.0}) == {name: 2.0 for name in NAMES if fits(name)}


def test_ranges_of_lists_and_of_a_sequentials_layers():
    params, f, r = ratios_of_four(["0", "1", "2"])
    report = dampen_(list(params.values()), list(f.values()), list(r.values()), alpha={"[0:2]": 1.0})
    assert report.names == ("0", "1") and report.left_out == ("2",)
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    f, r = ({n: torch.full_like(p, v) for n, p in model.named_parameters()} for v in (4.0, 1.0))
    assert dampen_(model, f, r, alpha={"[1:].weight": 1.0}).names == ("1.weight", "2.weight")


def test_of_several_keys_the_one_that_fits_most_counts():
    settings = {"": 1.0, "model": 2.0, "model.layers[3:6]": 3.0, "model.layers[3:6].mlp": 0.5, "head": 9.0}
    for order in itertools.permutations(settings):
        found = chosen({key: settings[key] for key in order})
        assert found["model.embed"] == 2.0 and found["head"] == 9.0 and found["model.layers.6.mlp.weight"] == 2.0
        assert found["model.layers.4.attn.weight"] == 3.0 and found["model.layers.4.mlp.weight"] == 0.5


def test_each_parameter_is_dampened_with_its_own():
    params, f, r = ratios_of_four(["a", "b.x", "b.y", "c"])
    alphas, lams = {"a": 1.0, "b": 3.0, "b.y": 4.0}, {"": 1.0, "b": 0.5, "b.y": 7.0}
    report = dampen_(params, f, r, alpha=alphas, lam=lams)
    assert {name: p[0].item() for name, p in params.items()} == {"a": 0.25, "b.x": 0.125, "b.y": 1.0, "c": 1.0}
    assert report.names == ("a", "b.x", "b.y") and report.left_out == ("c",)
    assert report.alpha == (1.0, 3.0, 4.0) and report.lam == (1.0, 0.5, 7.0)
    assert report.parameters["b.x"].mean_factor == 0.125 and report.total.elements == 9
    assert "1 that alpha leaves out are unchanged" in str(report)


def test_functions_of_the_name():
    found = chosen(lambda name: None if name == "head" else np.float32(0.5) if "mlp" in name else 3, lam=lambda name: 2)
    assert "head" not in found and found["model.embed"] == 3.0 and found["model.layers.5.mlp.weight"] == 0.5


def test_lam_is_not_asked_for_what_alpha_leaves_out():
    assert list(chosen({"head": 1.0}, lam={"head": 2.0})) == ["head"]
    assert list(chosen({"head": 1.0}, lam=lambda name: 2.0 if name == "head" else None)) == ["head"]


def test_numbers_are_reported_for_every_parameter():
    report = dampen_(*ratios_of_four(["a", "b"]), alpha=3, lam=np.float64(0.5))
    assert report.alpha == (3.0, 3.0) and report.lam == (0.5, 0.5) and report.left_out == ()


@given(
    rows=triples(),
    alphas=st.lists(st.sampled_from((0.0, 0.5, 1.7, 2.0, 1e9, INF)), min_size=4, max_size=4),
    lams=st.lists(st.sampled_from((0.0, 0.3, 1.0, 5.0)), min_size=4, max_size=4),
    limits=st.sampled_from(((1.0, 0.0), (0.7, 0.2), (INF, 0.5), (0.5, 0.5), (3.0, 1.5))),
    exponent=st.sampled_from((1.0, 2.0, 3.0)),
)
def test_any_shapes_strides_and_dtypes_equal_the_reference(rows, alphas, lams, limits, exponent):
    params, f, r = columns(rows)
    names = [str(i) for i in range(len(rows))]
    settings = {"exponent": exponent, "cap": limits[0], "floor": limits[1]}
    per_name = {k: dict(zip(names, v, strict=False)) for k, v in (("alpha", alphas), ("lam", lams))}
    expected = clones(params)
    wanted = reference.dampen_(expected, clones(f), clones(r), **per_name, **settings)
    report = dampen_(params, f, r, **per_name, **settings)
    nan = [(p.isnan(), q.isnan()) for p, q in zip(params, expected, strict=True)]
    assert all(torch.equal(a, b) for a, b in nan)
    clean = [[t.masked_fill(t.isnan(), 0) for t in side] for side in (params, expected)]
    assert same(*clean)
    assert torch.equal(report.stats[:, :3], wanted.stats[:, :3])
    torch.testing.assert_close(report.stats[:, 3], wanted.stats[:, 3], rtol=1e-12, atol=0, equal_nan=True)


def test_hundreds_of_tensors_with_settings_of_their_own_and_any_number_of_threads():
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        params, f, r = columns(many_tensors())
        singly = clones(params)
        report = dampen_(params, f, r, alpha=lambda name: int(name) % 5 * 0.5, lam=lambda name: 1 / (1 + int(name)))
        results.append([*params, report.stats])
        for k in range(0, len(params), 7):
            own = dampen_([singly[k]], [f[k]], [r[k]], alpha=k % 5 * 0.5, lam=1 / (1 + k))
            assert torch.equal(bits(singly[k]), bits(params[k])) and torch.equal(own.stats[0], report.stats[k])
    torch.set_num_threads(threads)
    assert same(*results)


# Floor


@pytest.mark.parametrize(
    ("floor", "cap", "ratio", "factor"),
    [
        (0.0, 1.0, 4.0, 0.25),
        (0.5, 1.0, 4.0, 0.5),
        (0.25, 1.0, 4.0, 0.25),
        (0.1, 1.0, 4.0, 0.25),
        (0.1, 1.0, INF, 0.1),  # r = 0
        (1.0, 1.0, 4.0, 1.0),
        (0.5, 0.5, 2.5, 0.5),
        (3.0, INF, 4.0, 3.0),
        (1, 1, 4.0, 1.0),
    ],
)
def test_no_value_shrinks_below_its_floor(floor, cap, ratio, factor):
    p, r = torch.tensor([-8.0]), torch.tensor([0.0 if ratio == INF else 1.0])
    f = torch.tensor([1.0 if ratio == INF else ratio])
    report = dampen_([p], [f], [r], alpha=2.0, cap=cap, floor=floor)
    assert p.item() == -8 * torch.tensor(factor).item() and report.total.mean_factor == pytest.approx(factor)


def test_infinite_importances_have_the_floor_too():
    p = torch.tensor([8.0])
    dampen_([p], [torch.tensor([INF])], [torch.tensor([1.0])], alpha=2.0, floor=0.5)
    assert p.item() == 4.0


# Errors


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": {"b": -1.0}}, ValueError, "alpha['b'] is -1.0: it must be >= 0"),
        ({"alpha": {"b": math.nan}}, ValueError, "alpha['b'] is nan: it must be >= 0"),
        ({"alpha": {"b": "1"}}, TypeError, "alpha['b'] is '1': it must be a number"),
        ({"alpha": {"b": None}}, TypeError, "alpha['b'] is None: it must be a number"),
        ({"alpha": {0: 1.0}}, TypeError, "alpha has the key 0: it must be a string"),
        ({"alpha": {"c": 1.0}}, ValueError, "alpha has 'c', which fits no parameter that has importances: it must be"),
        ({"alpha": {"bb[0:2]": 1.0}}, ValueError, "alpha has 'bb[0:2]', which fits no parameter"),
        ({"alpha": {"b[2:1]": 1.0}}, ValueError, "alpha has 'b[2:1]', which fits no parameter"),
        ({"alpha": {"b[-2:]": 1.0}}, ValueError, "alpha has 'b[-2:]', which fits no parameter"),
        ({"alpha": {"b.": 1.0}}, ValueError, "alpha has 'b.', which fits no parameter"),
        ({"alpha": {"l.1": 1.0, "l[0:2]": 1.0}}, ValueError, "alpha has 'l.1' and 'l[0:2]', which both fit 'l.1.x'"),
        ({"alpha": lambda name: -2.0}, ValueError, "alpha['b'] is -2.0: it must be >= 0"),
        ({"alpha": lambda name: "x"}, TypeError, "alpha['b'] is 'x': it must be a number"),
        ({"alpha": lambda name: True}, TypeError, "alpha['b'] is True: it must be a number"),
        ({"alpha": [1.0, 2.0]}, TypeError, "alpha is [1.0, 2.0]: it must be a number"),
        ({"alpha": None}, TypeError, "alpha is None: it must be a number"),
        ({"lam": {"b": INF}}, ValueError, "lam['b'] is inf: it must be finite in float32"),
        ({"lam": lambda name: 1e39}, ValueError, "lam['b'] is 1e+39: it must be finite in float32"),
        ({"lam": {"b": 1.0}}, ValueError, "lam has nothing for 'l.1.x', which alpha has: give both, or no alpha"),
        ({"lam": lambda name: None}, ValueError, "lam has nothing for 'b', which alpha has"),
        ({"floor": -0.1}, ValueError, "floor is -0.1: it must be >= 0"),
        ({"floor": math.nan}, ValueError, "floor is nan: it must be >= 0"),
        ({"floor": "0"}, TypeError, "floor is '0': it must be a number"),
        ({"floor": 1.5}, ValueError, "floor is 1.5 and cap 1.0: floor must not be above cap"),
        ({"floor": 0.5, "cap": 0.25}, ValueError, "floor is 0.5 and cap 0.25: floor must not be above cap"),
        ({"floor": INF, "cap": INF}, ValueError, "floor is inf: it must be finite in float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_before_the_first_write(settings, error, message):
    params, f, r = ratios_of_four(["b", "l.1.x"])
    with pytest.raises(error, match=re.escape(message)):
        dampen_(params, f, r, **{"alpha": 1.0, **settings})
    assert all(p.eq(1).all() for p in params.values())


def test_a_function_that_fails_changes_nothing():
    params, f, r = ratios_of_four(["a", "b"])

    def fails(name: str) -> float:
        if name == "b":
            raise KeyError(name)
        return 1.0

    with pytest.raises(KeyError):
        dampen_(params, f, r, alpha=fails)
    assert all(p.eq(1).all() for p in params.values())


@pytest.mark.parametrize(
    "settings",
    [{"alpha": {"other": 1.0}}, {"lam": {"0": 1.0, "other": 1.0}}, {"alpha": lambda n: -1}, {"undo": 1}],
    ids=["alpha of another", "lam of another", "alpha of a function", "undo"],
)
def test_ssd_and_its_settings_before_anything_is_measured(settings):
    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        pytest.fail("measured")

    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        ssd_(nn.Sequential(nn.Linear(2, 2)), forget=[1], reference=[1], losses=losses, **{"alpha": 1.0, **settings})


@pytest.mark.parametrize("how", ["mapping", "function", "operator"])
def test_compiled_as_one_graph(how):
    (p, f, r), (q, _, _) = ratios_of_four(["l.0", "l.1"]), ratios_of_four(["l.0", "l.1"])
    settings = {
        "mapping": {"alpha": {"l[0:1]": 1.0, "l.1": 5.0}, "lam": {"l": 2.0}},
        "function": {"alpha": lambda name: 1.0 if name == "l.0" else 5.0, "lam": lambda name: 2.0},
    }

    def run(params: dict[str, Tensor]) -> Tensor:
        if how != "operator":
            return dampen_(params, f, r, floor=0.1, **settings[how]).stats
        tensors = [list(x.values()) for x in (params, f, r)]
        return torch.ops.unlearn_fast.dampen_(*tensors, [1.0, 5.0], [2.0, 2.0], 1.0, 1.0, 0.1)

    stats = torch.compile(run, fullgraph=True, backend="aot_eager")(p)
    assert torch.equal(stats, run(q)) and all(torch.equal(p[name], q[name]) for name in p)
    assert p["l.0"].eq(0.5).all() and p["l.1"].eq(1).all()
