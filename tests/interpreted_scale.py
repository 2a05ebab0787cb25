"""sum_grad_squared_scale_'s Triton kernels, interpreted."""

import pytest
import torch
from interpreted import DTYPES, MOMENTS, assert_moments, randn, sums
from layouts import LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast.ops import _triton
from unlearn_fast.ops.sum_grad_squared_scale.triton import sum_grad_squared_scale_


def check(x: Tensor | None, g: Tensor, weights=False, first=False, absolute=False, layout="contiguous") -> Tensor:
    before = sums((g.shape[-1],), len(g), g.dtype, weights, first)
    out, w, mean = (None if v is None else lay_out(v, layout) for v in before)
    guards = [surroundings(v) for v in (out, mean) if v is not None]
    sum_grad_squared_scale_(out, x, g, w, mean, 0.3, absolute)
    products = g.double() if x is None else x.double() * g.double()
    assert_moments(out, mean, before, products.sum(1), products.abs().sum(1), absolute, 0.3)
    assert all(torch.equal(surroundings(v), y) for v, y in zip((out, mean), guards, strict=False) if v is not None)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "T", "C"), [(1, 1, 1), (3, 7, 5), (2, 700, 33), (1, 1030, 3), (70, 2, 130), (300, 1, 17)]
)
@pytest.mark.parametrize(("weights", "first", "absolute"), MOMENTS)
def test_shapes(dtype, B, T, C, weights, first, absolute):
    x, g = randn(B, T, C, dtype=dtype), randn(B, T, C, dtype=dtype, seed=9)
    check(x, g, weights, first, absolute)
    check(None, g, weights, first, absolute)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 9, 20), (2, 600, 5)], ids=str)
def test_strides(layout, shape):
    x, g = randn(*shape, dtype=torch.float32), randn(*shape, dtype=torch.float32, seed=9)
    check(lay_out(x, layout), lay_out(g, layout), True, True, layout=layout)
    check(x, lay_out(g, layout))


@pytest.mark.parametrize("shape", [(2, 5, 700), (9, 64, 49), (1, 3, 2000)], ids=str)
def test_channels_first(shape):
    x, g = randn(*shape, dtype=torch.float32), randn(*shape, dtype=torch.float32, seed=9)
    check(x.transpose(1, 2), g.transpose(1, 2), True, True)


@pytest.mark.parametrize("processors", [1, 3, 200])
@pytest.mark.parametrize("shape", [(9, 5, 3), (2, 900, 5), (1000, 2, 17)], ids=str)
def test_any_split(processors, shape, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED_PROCESSORS", processors)
    check(randn(*shape, dtype=torch.float64), randn(*shape, dtype=torch.float64, seed=9), True, True)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_nothing_to_add(shape):
    out = torch.full((shape[2],), torch.nan)
    sum_grad_squared_scale_(out, None, torch.ones(shape), None, None, 1.0, False)
    assert out.isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hostile_value_stays_in_its_channel(value):
    x, g = randn(3, 4, 20, dtype=torch.float32), randn(3, 4, 20, dtype=torch.float32, seed=9)
    x[1, 2, 17] = value
    out = check(x[:, :, :17], g[:, :, :17])
    whole = torch.zeros(20)
    sum_grad_squared_scale_(whole, x, g, None, None, 1.0, False)
    assert out.isfinite().all() and whole[torch.arange(20) != 17].isfinite().all() and not whole[17].isfinite()
