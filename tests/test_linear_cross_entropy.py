"""linear_cross_entropy: torch's contract, and where it differs."""

import inspect
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unlearn_fast import linear_cross_entropy, reference

IGNORE = -100
REDUCTIONS = ("mean", "sum", "none")


def make_inputs(dtype: torch.dtype = torch.float64, leading: tuple[int, ...] = (13,)):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((*leading, 6), (37, 6), (37,)))
    target = torch.randint(37, leading, generator=g)
    target.view(-1)[::4] = IGNORE
    return x, w, target, b


def with_gradients(function, inputs, bias: bool = True, **options) -> list[Tensor]:
    x, w, b = (inputs[i].detach().clone().requires_grad_() for i in (0, 1, 3))
    value = function(x, w, inputs[2], **({"linear_bias": b} if bias else {}), **options)
    cotangent = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape) if value.dim() else None
    return [value.detach(), *torch.autograd.grad(value, [x, w, b] if bias else [x, w], cotangent)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_is_torchs(reduction, smoothing, bias, rows):
    inputs = make_inputs()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours = with_gradients(linear_cross_entropy, inputs, bias, chunk_bytes=rows * 37 * 8, **options)

    def torchs(x, w, y, linear_bias=None, **options):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w, linear_bias), y, **options)

    expected = with_gradients(torchs, inputs, bias, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
    specified = with_gradients(reference.linear_cross_entropy, inputs, bias, **options)
    torch.testing.assert_close(specified, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_accurate_as_torch(dtype, smoothing, reduction):
    inputs = make_inputs(dtype)
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours = with_gradients(linear_cross_entropy, inputs, **options)
    torchs, exact = (with_gradients(reference.linear_cross_entropy, x, **options) for x in (inputs, wide))
    for i, truth in enumerate(exact):
        errors = [float((x[i].double() - truth).abs().max() / truth.abs().max()) for x in (ours, torchs)]
        assert ours[i].dtype == (dtype if i else torch.float32)
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(ours[i].dtype).eps


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_target_is_zero(reduction, smoothing):
    """Where torch's mean is NaN."""
    for n in (0, 3):
        inputs = make_inputs(leading=(n,))
        inputs[2].fill_(IGNORE)
        inputs[0].fill_(math.nan)
        results = with_gradients(linear_cross_entropy, inputs, reduction=reduction, label_smoothing=smoothing)
        assert all((x == 0).all() for x in results)


def test_other_shapes_and_targets():
    inputs = make_inputs(leading=(2, 3, 4))
    x, w, y, b = inputs
    for reduction in REDUCTIONS:
        expected = linear_cross_entropy(x.view(24, 6), w, y.view(24), linear_bias=b, reduction=reduction)
        other = y.masked_fill(y == IGNORE, -1).int()
        ours = linear_cross_entropy(x, w, other, linear_bias=b, reduction=reduction, ignore_index=-1)
        torch.testing.assert_close(ours, expected.view(y.shape) if reduction == "none" else expected)
    assert linear_cross_entropy(x[0, 0, 1], w, y[0, 0, 1], reduction="none").shape == ()


def test_floating_point_operations():
    x, w, y, _ = make_inputs()
    x.requires_grad_(), w.requires_grad_()
    product = 2 * int((y != IGNORE).sum()) * 37 * 6
    for reduction in ("mean", "sum"):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(x, w, y, reduction=reduction, chunk_bytes=5 * 37 * 8).backward()
        assert counter.get_total_flops() == 3 * product


def test_parameters_are_torchs():
    torchs = inspect.signature(torch.nn.functional.linear_cross_entropy).parameters
    ours = inspect.signature(linear_cross_entropy).parameters
    assert [n for n in torchs if n not in ("weight", "options")] == [n for n in ours if n in torchs]


F, L = torch.zeros, torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((F(2, 3).long(), F(5, 3), L), {}, TypeError, "input has dtype torch.int64"),
        ((F(2, 3), F(5, 3), F(2)), {}, TypeError, "target has dtype torch.float32"),
        ((F(3, 3), F(5, 3), L), {}, ValueError, r"target has shape \[2\] and input \[3, 3\]"),
        ((F(2, 3), F(3, 5), L), {}, ValueError, r"linear_weight has shape \[3, 5\].*H = 3, as in input"),
        ((F(2, 3), F(5, 3), L), {"linear_bias": F(4)}, ValueError, r"linear_bias has shape \[4\].*V = 5"),
        ((F(2, 3), F(5, 3).double(), L), {}, ValueError, "linear_weight is torch.float64.*must be torch.float32"),
        (
            (F(2, 3), F(5, 3), L),
            {"reduction": "max"},
            ValueError,
            "reduction must be one of mean, sum, none; got 'max'",
        ),
        ((F(2, 3), F(5, 3), L), {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ((F(2, 3), F(5, 3), L), {"chunk_bytes": 0}, ValueError, "chunk_bytes is 0"),
        ((F(2, 3), F(5, 3), L), {"weight_grad_dtype": torch.int64}, ValueError, "weight_grad_dtype is torch.int64"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_target_outside_the_vocabulary_raises(reduction):
    with pytest.raises(RuntimeError, match="labels holds 5 at row"):
        linear_cross_entropy(F(2, 3), F(5, 3), torch.tensor([0, 5]), reduction=reduction)
