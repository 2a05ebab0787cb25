"""sum_grad_squared_conv_'s Triton kernel, interpreted."""

import pytest
import torch
from interpreted import DTYPES, MOMENTS, assert_moments, randn, sums
from layouts import LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast.ops import _triton
from unlearn_fast.ops.sum_grad_squared_conv import triton as conv
from unlearn_fast.ops.sum_grad_squared_conv.triton import sum_grad_squared_conv_

CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}

CASES = {  # leading axes, C, O, in, kernel, stride, padding, dilation, groups
    "1d": ((3, 1), 5, 7, (9,), (3,), (1,), (1,), (1,), 1),
    "1d, strided, dilated, several images": ((2, 3), 4, 6, (17,), (3,), (2,), (3,), (2,), 2),
    "2d": ((2, 1), 3, 8, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d, uneven": ((3, 1), 4, 5, (9, 11), (3, 2), (2, 3), (0, 2), (1, 2), 1),
    "2d, many channels": ((2, 1), 70, 20, (3, 5), (1, 3), (1, 1), (0, 1), (1, 1), 1),
    "2d, mixed taps": ((2, 2), 20, 9, (5, 5), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "2d, groups": ((2, 1), 36, 10, (5, 4), (2, 2), (1, 1), (0, 1), (1, 1), 2),
    "depthwise": ((2, 1), 5, 10, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 5),
    "one tap": ((2, 1), 20, 9, (5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one tap, strided, several images": ((2, 3), 5, 9, (6, 5), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "one tap, padded": ((2, 1), 5, 9, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1),
    "one position": ((4, 1), 3, 5, (4, 4), (4, 4), (1, 1), (0, 0), (1, 1), 1),
    "patches": ((2, 1), 3, 5, (8, 9), (4, 4), (4, 4), (0, 0), (1, 1), 1),
    "3d": ((2, 1), 3, 4, (4, 5, 3), (2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2), 1),
}


def make(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, list]:
    leading, C, O, size, kernel, stride, padding, dilation, groups = CASES[case]  # noqa: E741
    x = randn(*leading, C, *size, dtype=dtype)
    weight = torch.empty(O, C // groups, *kernel, device="meta")
    positions = CONV[len(size)](x[0].to("meta", torch.float32), weight, None, stride, padding, dilation, groups)
    g = randn(leading[0], *positions.shape, dtype=dtype, seed=9)
    return x, g, [list(stride), list(padding), list(dilation), groups]


def gradients(x: Tensor, g: Tensor, shape: torch.Size, geometry: list) -> Tensor:
    found = []
    for images, grads in zip(x.double(), g.double(), strict=True):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = CONV[len(shape) - 2](images, weight, None, *geometry)
        found += torch.autograd.grad(y, weight, grads)
    return torch.stack(found)


def check(case: str, dtype: torch.dtype, weights=False, first=False, absolute=False, layout="contiguous") -> None:
    x, g, geometry = make(case, dtype)
    kernel, groups = CASES[case][4], geometry[-1]
    before = sums((g.shape[2], x.shape[2] // groups, *kernel), len(x), dtype, weights, first)
    out, w, mean = (None if v is None else lay_out(v.clone(), layout) for v in before)
    guards = [surroundings(v) for v in (out, mean) if v is not None]
    sum_grad_squared_conv_(out, lay_out(x, layout), lay_out(g, layout), *geometry, w, mean, 0.3, absolute)
    sizes = gradients(x.abs(), g.abs(), out.shape, geometry)
    assert_moments(out, mean, before, gradients(x, g, out.shape, geometry), sizes, absolute, 0.3)
    assert all(torch.equal(surroundings(v), y) for v, y in zip((out, mean), guards, strict=False) if v is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_geometries(dtype, case):
    check(case, dtype)
    check(case, dtype, True, True)


@pytest.mark.parametrize("case", ["1d", "one tap", "depthwise"])
@pytest.mark.parametrize(("weights", "first", "absolute"), MOMENTS)
def test_moments(case, weights, first, absolute):
    check(case, torch.float32, weights, first, absolute)


@pytest.mark.parametrize("case", ["1d, strided, dilated, several images", "2d, many channels", "one tap", "3d"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(case, layout):
    check(case, torch.float32, True, True, layout=layout)


@pytest.mark.parametrize("channels_last", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("case", ["2d, many channels", "2d, mixed taps"])
def test_channels_last(case, channels_last):
    x, g, geometry = make(case, torch.float32)
    turned = [v.movedim(2, -1).contiguous().movedim(-1, 2) for v in (x, g)]
    x, g = (new if last else old for old, new, last in zip((x, g), turned, channels_last, strict=True))
    before = sums((g.shape[2], x.shape[2], *CASES[case][4]), len(x), x.dtype, False, False)
    out = before[0].clone()
    sum_grad_squared_conv_(out, x, g, *geometry, None, None, 0.3, False)
    sizes = gradients(x.abs(), g.abs(), out.shape, geometry)
    assert_moments(out, None, before, gradients(x, g, out.shape, geometry), sizes, False, 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile(dtype):
    """Some of one tap, some of several."""
    shape = (20, 70, 1, 2)
    x, g = randn(2, 1, 70, 3, 5, dtype=dtype), randn(2, 1, 20, 3, 6, dtype=dtype, seed=9)
    options = [[1, 1], [0, 1], [1, 1], 1]
    geometry = conv.Geometry((1, 1, 1), (0, 0, 1), (1, 1, 1), (1, 1, 2), 1, 2)
    sizes, exact = gradients(x.abs(), g.abs(), shape, options), gradients(x, g, shape, options)
    for first in (False, True):
        before = sums(shape, 2, dtype, True, first)
        call = conv.Call(x.unsqueeze(3), g.flatten(3), (1, 3, 6), geometry, before[1], False, first)
        for tile in call.tiles:
            parts = [None if p is None else p.sum(0).transpose(1, 2).reshape(shape) for p in call.launch(tile)]
            places = [None if p is None else v + 0.3 * p for p, v in zip(parts, (before[0], before[2]), strict=True)]
            assert_moments(*places, before, exact, sizes, False, 0.3)


@pytest.mark.parametrize("processors", [1, 3, 200])
def test_any_split_of_the_examples(processors, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED_PROCESSORS", processors)
    check("2d", torch.float64, True, True)


@pytest.mark.parametrize("shape", [(0, 1), (2, 0)])
def test_nothing_to_add(shape):
    out = torch.full((2, 3, 3), torch.nan)
    sum_grad_squared_conv_(
        out, torch.ones(*shape, 3, 5), torch.ones(*shape, 2, 3), [1], [0], [1], 1, None, None, 1.0, False
    )
    assert out.isnan().all()
