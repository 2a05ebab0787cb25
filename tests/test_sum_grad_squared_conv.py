"""sum_grad_squared_conv_ against float64: shapes, settings, strides, hostile values, and what it must not write."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import assert_accurate, assert_as_accurate, bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out, surroundings
from torch import Tensor
from torch.nn import functional

from unlearn_fast import reference, sum_grad_squared_conv_

INF, NAN = math.inf, math.nan

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Layer:
    """A convolution and the shape of its input; one entry a spatial axis."""

    channels: int  # of a group
    outputs: int  # of a group
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    padding: tuple[int, ...] | int = 0
    dilation: tuple[int, ...] | int = 1
    groups: int = 1
    leading: tuple[int, ...] = (3,)

    def settings(self) -> dict:
        return {n: getattr(self, n) for n in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.size) - 1]
        return convolve(x, weight, **self.settings())

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """out >= 0, inputs, grad_outputs, weights, first."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        out = normal(self.outputs * self.groups, self.channels, *self.kernel).abs()
        x = normal(*self.leading, self.channels * self.groups, *self.size)
        positions = self.forward(x.flatten(0, len(self.leading) - 1)[:1], out).shape[1:]
        g, wide = normal(*self.leading, *positions), torch.promote_types(dtype, torch.float32)
        return [out.to(wide), x.to(dtype), g.to(dtype), normal(self.leading[0]).to(wide), normal(*out.shape).to(wide)]

    def runs(self, absolute: bool = False, weighted: bool = True, firsts: bool = True):
        def run(library, tensors: list[Tensor]) -> list[Tensor]:
            out, x, g, weights, first = tensors
            out, first = out.clone(), first.clone()
            library.sum_grad_squared_conv_(
                out, x, g, **self.settings(), scale=0.3, absolute=absolute,
                weights=weights if weighted else None, first=first if firsts else None,
            )  # fmt: skip
            return [out, first]

        return run


class ours:
    sum_grad_squared_conv_ = staticmethod(sum_grad_squared_conv_)


def assert_right(layer: Layer, tensors: list[Tensor], dtype: torch.dtype, **options: bool) -> None:
    run = layer.runs(**options)
    # Errors count relative to the sum of the terms' magnitudes: the inner sum over positions may cancel.
    assert_as_accurate(run, tensors, dtype, scales=lambda x: run(reference, [y.abs() for y in x]))


def channels_last(x: Tensor, axes: int) -> Tensor:
    return x.movedim(-1 - axes, -1).contiguous().movedim(-1, -1 - axes)


# Accuracy


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    axes = draw(st.integers(1, 3))

    def each(*values: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(axes))

    kernel, dilation = each(1, 1, 2, 3, 4), each(1, 1, 2)
    longest = {1: 300, 2: 19, 3: 6}[axes]
    room = [draw(st.integers(0, longest)) for _ in range(axes)]
    size = tuple(d * (k - 1) + 1 + n for d, k, n in zip(dilation, kernel, room, strict=True))
    return Layer(
        draw(st.sampled_from((1, 2, 5, 24, 33))), draw(st.sampled_from((1, 2, 5, 13, 30))), size, kernel,
        each(1, 1, 2, 3), each(0, 1, 2), dilation, draw(st.sampled_from((1, 1, 2, 3))),
        draw(st.sampled_from(((0,), (1,), (2,), (5,), (9, 1), (2, 3)))),
    )  # fmt: skip


@every_dtype
@given(
    layer=layers(),
    layouts=st.tuples(*[st.sampled_from((*LAYOUTS, "channels last"))] * 5),
    options=st.fixed_dictionaries({n: st.booleans() for n in ("absolute", "weighted", "firsts")}),
    seed=st.integers(0, 1000),
)
def test_any_convolution(dtype, layer, layouts, options, seed):
    axes = len(layer.size)
    places = [
        channels_last(x, axes) if layout == "channels last" and x.dim() > axes else lay_out(x, layout)
        for x, layout in zip(layer.inputs(dtype, seed), layouts, strict=True)
    ]
    assert_right(layer, places, dtype, **options)


LAYERS = {
    "as in a ResNet": Layer(64, 64, (16, 16), (3, 3), 1, 1),
    "a stem": Layer(3, 64, (32, 32), (7, 7), 2, 3),
    "downsampling": Layer(64, 128, (16, 16), (3, 3), 2, 1),
    "a projection": Layer(64, 128, (16, 16), (1, 1), 2),
    "one position an example": Layer(40, 100, (3, 3), (3, 3), leading=(300,)),
    "many small examples": Layer(33, 13, (2, 2), (3, 3), 1, 1, leading=(70,)),
    "patches": Layer(3, 50, (32, 32), (16, 16), 16),
    "several boxes": Layer(32, 5, (40, 70), (3, 3), 1, 1),
    "a long line": Layer(32, 5, (3000,), (5,), 2, 2),
    "wide dilation": Layer(32, 5, (40, 40), (3, 3), 1, 16, 16),
    "a kernel beyond a region": Layer(32, 5, (3000,), (1500,), 7),
    "stride beyond the kernel": Layer(32, 12, (30, 31), (2, 1), (5, 3)),
    "padding alone": Layer(32, 5, (1, 1), (3, 3), 1, 3),
    "depthwise": Layer(1, 1, (17, 16), (3, 3), 1, 1, groups=70),
    "depthwise, strided, two outputs": Layer(1, 2, (17, 16), (5, 5), 2, 2, groups=33),
    "depthwise, 1d": Layer(1, 1, (1000,), (4,), 1, 3, groups=40),
    "depthwise, a kernel beyond a region": Layer(1, 1, (1600,), (1500,), groups=3),
    "groups": Layer(4, 4, (14, 14), (3, 3), 1, 1, groups=8),
    "images of an example": Layer(32, 20, (5, 5), (3, 3), 1, 1, leading=(3, 30)),
    "three axes": Layer(24, 20, (5, 8, 9), (3, 3, 3), 1, 1),
}


@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_every_way_through_the_kernel(dtype, layer, layout):
    tensors = layer.inputs(dtype)
    if layout == "channels last":
        tensors[1:3] = (channels_last(x, len(layer.size)) for x in tensors[1:3])
    assert_right(layer, tensors, dtype)


def test_expanded_and_sliced_inputs():
    layer = Layer(32, 12, (6, 7), (3, 3), 1, 1, leading=(4,))
    out, x, g, *rest = layer.inputs()
    assert_right(layer, [out, x[:1].expand_as(x), g[:, :1].expand_as(g), *rest], torch.float32)
    assert_right(layer, [out, torch.ones(()).expand_as(x), g, *rest], torch.float32)
    large = torch.randn(4, 40, 12, 9)
    assert_right(layer, [out, large[:, 3:35, ::2, 1:-1], g.flip(-1), *rest], torch.float32)


@pytest.mark.parametrize("layer", [LAYERS["as in a ResNet"], LAYERS["depthwise"], LAYERS["three axes"]], ids=str)
def test_it_is_the_sum_of_squared_gradients(layer):
    """Against what it is for: autograd's weight gradient of every example."""
    out, x, g, weights, first = layer.inputs(torch.float64)
    expected, expected_first = out.clone(), first.clone()
    for example, grad, weight in zip(x, g, weights, strict=True):
        parameter = torch.zeros_like(out, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer.forward(example[None], parameter), parameter, grad[None])
        expected += 0.3 * weight * gradient.square()
        expected_first += 0.3 * weight * gradient
    torch.testing.assert_close(layer.runs()(ours, [out, x, g, weights, first]), [expected, expected_first])


def test_numbers_and_lists_of_settings_are_the_same():
    layer = Layer(5, 6, (9, 9), (3, 3), 2, 1, 2)
    lists = replace(layer, stride=(2, 2), padding=(1, 1), dilation=(2, 2))
    results = [each.runs()(ours, layer.inputs()) for each in (layer, lists)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# In place


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
def test_nothing_but_out_and_first_is_written(layout):
    layer = Layer(33, 13, (5, 6), (3, 3), 1, 1)
    places = [channels_last(x, 2) if layout == "channels last" and x.dim() > 2 else lay_out(x, layout)
              for x in layer.inputs()]  # fmt: skip
    guards, values = [surroundings(x) for x in places], [x.clone() for x in places]
    expected = layer.runs()(reference, [x.double() for x in places])
    out, x, g, weights, first = places
    assert sum_grad_squared_conv_(out, x, g, **layer.settings(), scale=0.3, weights=weights, first=first) is out
    for result, wanted in zip((out, first), expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(surroundings(x), guard) for x, guard in zip(places, guards, strict=True))
    assert all(torch.equal(places[i], values[i]) for i in (1, 2, 3))


def test_versions_and_graphs():
    layer = Layer(5, 6, (9,), (3,))
    out, x, g, _, first = layer.inputs()
    versions = out._version, first._version
    sum_grad_squared_conv_(out, x.requires_grad_(), g.requires_grad_(), first=first)
    assert out._version > versions[0] and first._version > versions[1] and not out.requires_grad
    with torch.inference_mode():
        layer.runs()(ours, layer.inputs())
        layer.runs()(reference, layer.inputs())


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)], ids=str)
def test_no_examples_add_nothing(leading):
    layer = Layer(5, 6, (9, 9), (3, 3))
    out, x, g, *_ = layer.inputs()
    x, g = x.new_empty(*leading, *x.shape[1:]), g.new_empty(*leading, *g.shape[1:])
    out[0, 0], out[1, 1] = NAN, -0.0
    before = bits(out).clone()
    sum_grad_squared_conv_(out, x, g)
    assert torch.equal(bits(out), before)


# Hostile values

HOSTILE = [LAYERS[n] for n in ("as in a ResNet", "a stem", "depthwise", "groups", "many small examples")]


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("layer", HOSTILE, ids=str)
def test_a_hostile_value_shows_where_autograd_shows_it(layer, value, layout):
    """In the columns of its channel, at the kernel offsets that read it."""
    tensors = layer.inputs()
    run = layer.runs(firsts=False, weighted=False)
    clean = run(ours, tensors)[0]
    tensors[1][1, 0, 0, 0] = value
    wanted = run(reference, [x.double() for x in tensors])[0]
    if layout == "channels last":
        tensors[1:3] = (channels_last(x, 2) for x in tensors[1:3])
    result = run(ours, tensors)[0]
    assert torch.equal(result.isfinite(), wanted.isfinite()) and not wanted.isfinite().all()
    assert torch.equal(result[wanted.isfinite()], clean[wanted.isfinite()])


def test_float16_products_do_not_overflow():
    x = torch.full((2, 1, 5), 60000.0, dtype=torch.float16)
    out = torch.zeros(1, 1, 3)
    sum_grad_squared_conv_(out, x, x[..., :3])
    assert_accurate(out, torch.full((1, 1, 3), 2 * (3 * x[0, 0, 0].double().item() ** 2) ** 2, dtype=torch.float64))


# Errors


Z = torch.zeros
IMAGE, GRADS = Z(2, 4, 7, 7), Z(2, 6, 5, 5)


@pytest.mark.parametrize(
    ("out", "x", "g", "settings", "error", "message"),
    [
        (Z(6, 4), IMAGE, GRADS, {}, ValueError, r"out has shape \[6, 4\].*1, 2 or 3 spatial axes"),
        (Z(6, 3, 3, 3), IMAGE, GRADS, {}, ValueError, r"inputs has shape \[2, 4, 7, 7\].*\[B, 3, \*in\]"),
        (Z(6, 4, 3), IMAGE, GRADS, {}, ValueError, r"inputs has shape .* with 1 spatial axes"),
        (Z(6, 4, 3, 3), IMAGE[0], GRADS[0], {}, ValueError, r"inputs has shape \[4, 7, 7\]"),
        (Z(6, 4, 3, 3), IMAGE, GRADS[:1], {}, ValueError, r"grad_outputs has shape \[1, 6, 5, 5\].*\[2, 6, 5, 5\]"),
        (Z(6, 4, 3, 3), IMAGE, GRADS, {"stride": 2}, ValueError, r"it must be \[2, 6, 3, 3\], the shape of the"),
        (Z(6, 4, 9, 3), IMAGE, GRADS, {}, ValueError, r"inputs has shape .*at least as large as the kernel \[9, 3\]"),
        (Z(6, 4, 3, 3), IMAGE, GRADS, {"stride": 0}, ValueError, "stride is 0: it must be .* of at least 1"),
        (Z(6, 4, 3, 3), IMAGE, GRADS, {"padding": (1,)}, ValueError, r"padding is \(1,\): .* or 2 numbers"),
        (Z(6, 4, 3, 3), IMAGE, GRADS, {"dilation": -1}, ValueError, "dilation is -1"),
        (Z(6, 4, 3, 3), IMAGE, GRADS, {"groups": 4}, ValueError, "groups is 4: it must be at least 1 and divide"),
        (Z(6, 4, 3, 3), IMAGE, GRADS, {"groups": 0}, ValueError, "groups is 0"),
        (Z(6, 4, 3, 3), IMAGE.long(), GRADS.long(), {}, TypeError, "inputs has dtype torch.int64"),
        (Z(6, 4, 3, 3), IMAGE, GRADS.half(), {}, TypeError, "grad_outputs has dtype torch.float16"),
        (Z(6, 4, 3, 3).double(), IMAGE, GRADS, {}, TypeError, "out has dtype torch.float64"),
        (Z(6, 4, 3, 3), IMAGE, GRADS, {"weights": Z(3)}, ValueError, r"weights has shape \[3\]"),
        (Z(6, 4, 3, 3), IMAGE, GRADS, {"first": Z(6, 4, 3, 1)}, ValueError, r"first has shape \[6, 4, 3, 1\]"),
        (Z(1, 4, 3, 3).expand(6, 4, 3, 3), IMAGE, GRADS, {}, ValueError, "out has overlapping"),
    ],
)
def test_bad_arguments(out, x, g, settings, error, message):
    with pytest.raises(error, match=message):
        sum_grad_squared_conv_(out, x + 1, g + 1, **settings)
    assert not out.any()


# torch.compile, threads


def test_compiled_as_one_graph():
    layer = Layer(5, 6, (9, 9), (3, 3), 2, 1)

    def run(out: Tensor, x: Tensor, g: Tensor, weights: Tensor, first: Tensor) -> Tensor:
        sum_grad_squared_conv_(out, x, g, **layer.settings(), weights=weights, first=first)
        return sum_grad_squared_conv_(torch.zeros_like(out), x, g, **layer.settings()) + 1

    tensors, copies = layer.inputs(), layer.inputs()
    wanted = run(*copies)
    result = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(result, wanted) and all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("name", ["downsampling", "a stem", "depthwise", "several boxes", "groups"])
def test_the_number_of_threads_does_not_matter(name):
    layer, threads, results = LAYERS[name], torch.get_num_threads(), []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        results.append(layer.runs()(ours, layer.inputs()))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))
