"""sum_grad_squared_linear_'s Triton kernels, interpreted."""

import pytest
import torch
from interpreted import DTYPES, MOMENTS, assert_moments, randn, sums
from layouts import LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast.ops import _triton
from unlearn_fast.ops.sum_grad_squared_linear import triton as linear
from unlearn_fast.ops.sum_grad_squared_linear.triton import sum_grad_squared_linear_

SHAPES = [  # leading axes, O, I
    ((1, 1), 1, 1),
    ((3, 7), 5, 11),
    ((2, 70), 65, 130),
    ((1, 33), 3, 140),
    ((40, 2), 17, 3),
    ((5,), 70, 80),
    ((77, 1), 9, 66),
]


def gradients(a: Tensor, g: Tensor) -> Tensor:
    a, g = (x.double() if x.dim() == 3 else x.double().unsqueeze(1) for x in (a, g))
    return torch.einsum("bto,bti->boi", g, a)


def check(a: Tensor, g: Tensor, weights=False, first=False, absolute=False, layout="contiguous") -> Tensor:
    before = sums((g.shape[-1], a.shape[-1]), len(a), a.dtype, weights, first)
    out, w, mean = (None if x is None else lay_out(x, layout) for x in before)
    guards = [surroundings(x) for x in (out, mean) if x is not None]
    sum_grad_squared_linear_(out, a, g, w, mean, 0.3, absolute)
    assert_moments(out, mean, before, gradients(a, g), gradients(a.abs(), g.abs()), absolute, 0.3)
    assert all(torch.equal(surroundings(x), y) for x, y in zip((out, mean), guards, strict=False) if x is not None)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("leading", "O", "I"), SHAPES, ids=str)
@pytest.mark.parametrize(("weights", "first", "absolute"), MOMENTS)
def test_shapes(dtype, leading, O, I, weights, first, absolute):  # noqa: E741
    check(randn(*leading, I, dtype=dtype), randn(*leading, O, dtype=dtype, seed=9), weights, first, absolute)


def test_it_is_what_serves_cuda():
    out, a, g = torch.zeros(2, 3), torch.ones(4, 5, 3), torch.ones(4, 5, 2)
    operator = torch.ops.unlearn_fast.sum_grad_squared_linear_.default
    operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), out, a, g, None, None, 0.5, False)
    assert torch.equal(out, torch.full((2, 3), 0.5 * 4 * 25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(2, 40), (19,)], ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_every_tile(dtype, leading, first):
    a, g = randn(*leading, 130, dtype=dtype), randn(*leading, 70, dtype=dtype, seed=9)
    before = sums((70, 130), len(a), dtype, True, first)
    a3, g3 = (x if x.dim() == 3 else x.unsqueeze(1) for x in (a, g))
    layouts = _triton.layouts(before[0], before[2], a3, g3, before[1])
    call = linear.Call(*layouts, False, "ieee", a.device, _triton.processors(a))
    operands = call.operands(a3, g3, before[1])
    for tile in call.tiles:
        out, mean = (None if x is None else x.clone() for x in (before[0], before[2]))
        call.launch(tile, [out, mean], operands, 0.3)
        assert_moments(out, mean, before, gradients(a, g), gradients(a.abs(), g.abs()), False, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("weights", "first", "absolute"), MOMENTS)
@pytest.mark.parametrize(("B", "T", "rows"), [(1, 40, 40), (3, 40, 48), (2, 70, 70)])
def test_every_tile_by_boxes(dtype, weights, first, absolute, B, T, rows):
    """Blocks that reach beyond the end of an example, of the columns, and of the tensor; rows that lie apart."""
    a = randn(B, rows, 136, dtype=dtype)[:, :T, :130]
    g = randn(B, rows, 72, dtype=dtype, seed=9)[:, :T, :70]
    before = sums((70, 130), B, dtype, weights, first)
    layouts = _triton.layouts(before[0], before[2], a, g, before[1])
    call = linear.Call(*layouts, absolute, "ieee", a.device, _triton.processors(a), by_boxes=True)
    for tile in call.tiles:
        out, mean = (None if x is None else x.clone() for x in (before[0], before[2]))
        call.launch(tile, [out, mean], call.operands(a, g, before[1]), 0.3)
        assert_moments(out, mean, before, gradients(a, g), gradients(a.abs(), g.abs()), absolute, 0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(3, 7), (6,)], ids=str)
def test_strides(layout, leading):
    a, g = randn(*leading, 11, dtype=torch.float32), randn(*leading, 5, dtype=torch.float32, seed=9)
    check(lay_out(a, layout), lay_out(g, layout), True, True, layout=layout)
    check(lay_out(a, layout), g)


def test_expanded_inputs():
    check(torch.ones(()).expand(4, 6, 3), randn(4, 6, 5, dtype=torch.float32))


@pytest.mark.parametrize("leading", [(0, 3), (3, 0), (0,)], ids=str)
def test_nothing_to_add(leading):
    out = torch.full((2, 3), torch.nan)
    sum_grad_squared_linear_(out, torch.ones(*leading, 3), torch.ones(*leading, 2), None, None, 1.0, False)
    assert out.isnan().all()


@pytest.mark.parametrize("processors", [1, 3, 50])
@pytest.mark.parametrize("leading", [(9, 5), (300, 1)], ids=str)
def test_any_split_of_the_examples(processors, leading, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED_PROCESSORS", processors)
    a, g = randn(*leading, 11, dtype=torch.float64), randn(*leading, 5, dtype=torch.float64, seed=9)
    check(a, g, True, True)


@pytest.mark.parametrize("leading", [(3,), (3, 4)], ids=str)
@pytest.mark.parametrize("shift", [1e20, 1e-20, 1e4])
def test_small_and_large_factors_whose_product_is_ordinary(leading, shift):
    check(randn(*leading, 7, dtype=torch.float32) * shift, randn(*leading, 5, dtype=torch.float32, seed=9) / shift)


@pytest.mark.parametrize("leading", [(3,), (3, 4)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_hostile_value_shows_in_its_own_column_only(leading, value):
    a, g = randn(*leading, 20, dtype=torch.float32), randn(*leading, 9, dtype=torch.float32)
    clean, out = torch.zeros(9, 20), torch.zeros(9, 20)
    sum_grad_squared_linear_(clean, a, g, None, None, 1.0, False)
    a[(0,) * len(leading) + (17,)] = value
    sum_grad_squared_linear_(out, a, g, None, None, 1.0, False)
    others = torch.arange(20) != 17
    assert torch.equal(out[:, others], clean[:, others])
    assert not out[:, 17].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.3, 0.0, float("nan")])
@pytest.mark.parametrize("n", [1, 4096, 60_001])
def test_scaling_in_place(dtype, factor, n):
    """Of gradients by the upstream one: a small part of every linear operator's loss."""
    x, by = randn(n, dtype=dtype), torch.tensor(factor)
    expected = (x.to(torch.promote_types(dtype, torch.float32)) * by).to(dtype)
    _triton.scale_(x, by)
    rounding = torch.finfo(dtype).eps if x.element_size() == 2 else 0  # the interpreter cuts digits off
    torch.testing.assert_close(x, expected, rtol=rounding, atol=0, equal_nan=True)
