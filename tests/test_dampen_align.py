"""dampen_: which importance goes to which parameter, tied and shared memory, and errors before the first write."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unlearn_fast import dampen_

Z = torch.zeros


class Tied(nn.Module):
    """A language model's shape: embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def ones(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        nn.init.ones_(p)
    return model


def importances(model: nn.Module, value: float, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: torch.full_like(p, value) for name, p in model.named_parameters()}


def values(model: nn.Module) -> dict[str, set[float]]:
    """The distinct values of every parameter: 1 before, 1/4 after one dampening, 1/16 after two."""
    return {name: set(p.flatten().tolist()) for name, p in model.named_parameters()}


# Names and positions


@pytest.mark.parametrize("params_as", ["module", "mapping"])
@pytest.mark.parametrize("prefixes", [("", ""), ("module.", "module."), ("module.", ""), ("", "module.")], ids=str)
def test_names_with_and_without_the_wrappers_prefix(params_as, prefixes):
    model = ones(nn.Linear(3, 2))
    params = model if params_as == "module" else dict(model.named_parameters())
    forget, rest = (importances(model, v, prefix) for v, prefix in zip((4.0, 1.0), prefixes, strict=True))
    assert dampen_(params, forget, rest, alpha=1.0).names == ("weight", "bias")
    assert values(model) == {"weight": {0.25}, "bias": {0.25}}


def test_a_wrapped_module_and_bare_names():
    model = ones(nn.Linear(3, 2))
    wrapped = nn.Module()
    wrapped.module = model
    dampen_(wrapped, importances(model, 4.0), importances(model, 1.0), alpha=1.0)
    assert values(model) == {"weight": {0.25}, "bias": {0.25}}


def test_a_prefix_does_not_confuse_two_parameters():
    """`module.weight` and `weight` are different parameters where a model has both."""
    model = nn.Module()
    model.module, model.weight = nn.Linear(3, 2, bias=False), nn.Parameter(Z(2, 3))
    ones(model)
    forget, rest = importances(model, 4.0), importances(model, 1.0)
    forget["weight"] *= 2
    report = dampen_(model, forget, rest, alpha=1.0)
    assert values(model) == {"weight": {0.125}, "module.weight": {0.25}} and len(report.names) == 2
    mapping = {"weight": torch.ones(2, 3), "module.weight": torch.ones(2, 3)}
    dampen_(mapping, forget, rest, alpha=1.0)
    assert mapping["weight"].eq(0.125).all() and mapping["module.weight"].eq(0.25).all()


def test_two_importances_for_one_parameter_are_refused():
    p = torch.ones(2)
    twice = {"a": torch.ones(2), "module.a": torch.full((2,), 9.0)}
    with pytest.raises(ValueError, match="forget"):
        dampen_({"a": p}, twice, {"a": Z(2)}, alpha=1.0)
    assert p.eq(1).all()


def test_names_are_matched_in_any_order_and_lists_by_position():
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    forget, rest = {"b": torch.full((2,), 4.0), "a": torch.full((2,), 2.0)}, {"a": torch.ones(2), "b": torch.ones(2)}
    assert dampen_(params, forget, rest, alpha=1.0).names == ("a", "b")
    assert params["a"].eq(0.5).all() and params["b"].eq(0.25).all()
    listed = [torch.ones(2), torch.ones(2)]
    report = dampen_(listed, list(forget.values()), tuple(rest.values()), alpha=1.0)
    assert report.names == ("0", "1") and listed[0].eq(0.25).all() and listed[1].eq(0.5).all()


def test_a_module_with_lists_in_the_order_of_its_parameters():
    model = ones(nn.Linear(3, 2))
    forget, rest = importances(model, 4.0), importances(model, 1.0)
    forget["bias"] *= 2
    dampen_(model, list(forget.values()), list(rest.values()), alpha=1.0)
    assert values(model) == {"weight": {0.25}, "bias": {0.125}}


def test_parameters_without_importance_stay_and_are_listed():
    model = ones(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    forget, rest = importances(model, 4.0), importances(model, 1.0)
    for name in ("0.bias", "1.weight"):
        del forget[name], rest[name]
    report = dampen_(model, forget, rest, alpha=1.0)
    assert report.without_importance == ("0.bias", "1.weight") and report.names == ("0.weight", "1.bias")
    assert values(model) == {"0.weight": {0.25}, "0.bias": {1.0}, "1.weight": {1.0}, "1.bias": {0.25}}
    assert "2 parameters without importance are unchanged" in str(report)


# Tied and shared memory


@pytest.mark.parametrize("named_as", ["embedding.weight", "head.weight"])
def test_tied_weights_are_dampened_once(named_as):
    model = ones(Tied())
    forget, rest = importances(model, 4.0), importances(model, 1.0)
    forget[named_as], rest[named_as] = forget.pop("embedding.weight"), rest.pop("embedding.weight")
    report = dampen_(model, forget, rest, alpha=1.0)
    assert values(model) == {"embedding.weight": {0.25}, "body.weight": {0.25}, "body.bias": {0.25}}
    assert report.total.elements == 12 + 9 + 3


def test_tied_weights_in_a_mapping_and_in_a_list():
    p = torch.ones(2)
    report = dampen_(
        {"a": p, "b": p}, dict.fromkeys("ab", torch.full((2,), 4.0)), dict.fromkeys("ab", torch.ones(2)), alpha=1.0
    )
    assert p.eq(0.25).all() and report.names == ("a",) and report.tied == {"b": "a"} and report.total.elements == 2
    p = torch.ones(2)
    report = dampen_([p, p.view(2), p.detach()], [torch.full((2,), 4.0)] * 3, [torch.ones(2)] * 3, alpha=1.0)
    assert p.eq(0.25).all() and report.names == ("0",) and report.tied == {"1": "0", "2": "0"}


SHARED = {
    "second half twice": lambda b: [b[:8], b[4:]],
    "a part of the whole": lambda b: [b, b[2:4]],
    "the transpose": lambda b: [b.view(3, 4), b.view(3, 4).T],
    "other strides": lambda b: [b[::2], b[::3]],
    "columns that overlap": lambda b: [b.view(3, 4)[:, :2], b.view(3, 4)[:, 1:3]],
    "one far, one near": lambda b: [b[0:12:4], b[1:3], b[4:5]],
}
SEPARATE = {
    "halves": lambda b: [b[:6], b[6:]],
    "interleaved": lambda b: [b[0::3], b[1::3], b[2::3]],
    "columns": lambda b: [b.view(3, 4)[:, :2], b.view(3, 4)[:, 2:]],
    "rows": lambda b: list(b.view(3, 4)),
    "odd shapes side by side": lambda b: [b[0:12:4], b[1:4], b[5:8]],
    "an empty view inside": lambda b: [b, b[3:3]],
}


@pytest.mark.parametrize("views", SHARED.values(), ids=SHARED)
def test_parameters_that_share_part_of_their_memory_are_refused(views):
    memory = torch.ones(12)
    params = views(memory)
    with pytest.raises(ValueError, match="share"):
        dampen_(params, [torch.full_like(p, 4.0) for p in params], [torch.ones_like(p) for p in params], alpha=1.0)
    assert memory.eq(1).all()


@pytest.mark.parametrize("views", SEPARATE.values(), ids=SEPARATE)
def test_separate_views_of_one_tensor_are_dampened_once_each(views):
    memory = torch.ones(12)
    params = views(memory)
    dampen_(params, [torch.full_like(p, 4.0) for p in params], [torch.ones_like(p) for p in params], alpha=1.0)
    assert sum(p.numel() for p in params) == memory.eq(0.25).sum()


# Errors: nothing is written, although the parameter before the wrong one is right


def good() -> list[Tensor]:
    return [torch.ones(3), torch.ones(2, 2)]


def replaced(index: int, value: object) -> list[object]:
    return [value if i == index else x for i, x in enumerate(good())]


ERRORS = {
    "integer parameter": (replaced(1, Z(2, 2).long()), good(), good(), TypeError, "params['1'] has dtype torch.int64"),
    "complex parameter": (
        replaced(1, Z(2, 2) + 0j),
        good(),
        good(),
        TypeError,
        "params['1'] has dtype torch.complex64",
    ),
    "sparse parameter": (replaced(1, Z(2, 2).to_sparse()), good(), good(), TypeError, "params['1'] has layout"),
    "expanded parameter": (replaced(1, Z(2).expand(2, 2)), good(), good(), ValueError, "params['1'] has overlapping"),
    "overlapping strides": (
        replaced(1, Z(3).as_strided((2, 2), (1, 1))),
        good(),
        good(),
        ValueError,
        "params['1'] has overlapping",
    ),
    "not a tensor": (replaced(1, [1.0]), good(), good(), TypeError, "params['1'] is a list: it must be a tensor"),
    "importance not a tensor": (good(), replaced(1, None), good(), TypeError, "forget['1'] is a NoneType"),
    "integer importance": (
        good(),
        good(),
        replaced(1, Z(2, 2).int()),
        TypeError,
        "reference['1'] has dtype torch.int32",
    ),
    "wrong shape": (good(), replaced(1, Z(4)), good(), ValueError, "forget['1'] has shape [4]: it must have"),
    "wrong shape that broadcasts": (
        good(),
        good(),
        replaced(1, Z(1, 2)),
        ValueError,
        "reference['1'] has shape [1, 2]",
    ),
    "too few": (good(), good()[:1], good(), ValueError, "forget has 1 tensors: it must have 2"),
    "too many": (good(), good(), [*good(), Z(1)], ValueError, "reference has 3 tensors: it must have 2"),
    "a tensor for a list": (good(), Z(2, 3), good(), TypeError, "forget is a Tensor: it must be a mapping"),
    "params a tensor": (Z(2), good(), good(), TypeError, "params is a Tensor: it must be a module, a mapping"),
    "params a string": ("ab", good(), good(), TypeError, "params is a str"),
    "mapping for a list": (
        good(),
        {"0": Z(3), "1": Z(2, 2)},
        good(),
        TypeError,
        "forget is a mapping and params a list",
    ),
}


@pytest.mark.parametrize(("params", "forget", "rest", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_in_the_last_parameter_leaves_the_first_untouched(params, forget, rest, error, message):
    with pytest.raises(error, match=re.escape(message)):
        dampen_(params, forget, [0 * r if isinstance(r, Tensor) else r for r in rest], alpha=1.0)
    if isinstance(params, list):
        assert params[0].eq(1).all()


def test_errors_of_names():
    model = ones(nn.Linear(3, 2))
    forget, rest = importances(model, 4.0), importances(model, 1.0)
    with pytest.raises(ValueError, match=r"forget has 'weigth' \(of 1 such names\): params has no such name"):
        dampen_(model, forget | {"weigth": Z(1)}, rest, alpha=1.0)
    with pytest.raises(ValueError, match="reference has no importance for 'bias'"):
        dampen_(model, forget, {"weight": rest["weight"]}, alpha=1.0)
    with pytest.raises(ValueError, match="forget has no importance for 'weight'"):
        dampen_(model, {"bias": forget["bias"]}, rest, alpha=1.0)
    assert values(model) == {"weight": {1.0}, "bias": {1.0}}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha is -1.0: it must be >= 0"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"alpha": 1.0, "lam": -0.5}, ValueError, "lam is -0.5: it must be >= 0"),
        ({"alpha": 1.0, "exponent": 0.0}, ValueError, "exponent is 0.0: it must be > 0"),
        ({"alpha": 1.0, "exponent": -1.0}, ValueError, "exponent is -1.0: it must be > 0"),
        ({"alpha": 1.0, "cap": -1.0}, ValueError, "cap is -1.0: it must be >= 0"),
        ({"alpha": "10"}, TypeError, "alpha is '10': it must be a number"),
        ({"alpha": True}, TypeError, "alpha is True: it must be a number"),
        ({"alpha": 1.0, "lam": None}, TypeError, "lam is None: it must be a number"),
    ],
    ids=str,
)
def test_bad_settings(settings, error, message):
    p = torch.ones(2)
    with pytest.raises(error, match=re.escape(message)):
        dampen_([p], [torch.ones(2)], [Z(2)], **settings)
    assert p.eq(1).all()


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64])
def test_numpy_numbers_are_settings(number):
    p = torch.ones(2)
    dampen_([p], [torch.full((2,), 4.0)], [torch.ones(2)], alpha=number(2), lam=number(1))
    assert p.eq(0.25).all()


def test_one_tensor_under_two_names_has_one_importance():
    w, f, r = torch.ones(3), torch.full((3,), 9.0), torch.ones(3)
    with pytest.raises(ValueError, match=r"'b'.*same tensor as 'a', with other importances"):
        dampen_({"a": w, "b": w}, {"a": torch.zeros(3), "b": f}, {"a": r, "b": r}, alpha=1.0)
    assert torch.equal(w, torch.ones(3))
    report = dampen_({"a": w, "b": w}, {"a": f, "b": f.clone()}, {"a": r, "b": r}, alpha=1.0)
    assert report.tied == {"b": "a"} and torch.equal(w, torch.full((3,), 1 / 9))


def test_sparse_importances_are_refused_before_the_first_write():
    params = [torch.ones(3), torch.ones(3, 3)]
    forget = [torch.full((3,), 9.0), torch.full((3, 3), 9.0).to_sparse()]
    with pytest.raises(TypeError, match=r"forget.*layout torch\.sparse_coo"):
        dampen_(params, forget, [torch.ones(3), torch.ones(3, 3)], alpha=1.0)
    assert torch.equal(params[0], torch.ones(3))
