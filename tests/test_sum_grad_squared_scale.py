"""sum_grad_squared_scale_ against float64: layouts, long sums, moments, hostile values, and what it must not write."""

import itertools
import math

import pytest
import torch
from accuracy import assert_accurate, assert_as_accurate, bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast import reference, sum_grad_squared_scale_

INF, NAN = math.inf, math.nan

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_inputs(B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """out >= 0, as sums of squares are; first; inputs; grad_outputs; weights >= 0."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (C,), (C,), (B, T, C), (B, T, C), (B,)
    out, first, x, g, weights = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [out.abs().to(wide), first.to(wide), x.to(dtype), g.to(dtype), weights.abs().to(wide)]


def add(library, inputs: list[Tensor], bias: bool = False, plain: bool = False, **options) -> list[Tensor]:
    """out and first after the call; `plain`: without weights and first."""
    out, first, x, g, weights = inputs
    out, first = out.clone(), first.clone()
    if not plain:
        options.update(weights=weights, first=first)
    library.sum_grad_squared_scale_(out, None if bias else x, g, scale=0.3, **options)
    return [out, first]


def assert_right(inputs: list[Tensor], dtype: torch.dtype, **options) -> None:
    """Errors relative to sums of magnitudes: the inner sum over positions may cancel."""
    assert_as_accurate(
        lambda library, x: add(library, x, **options),
        inputs,
        dtype,
        scales=lambda x: add(reference, [t.abs() for t in x], **options),
    )


class operator:
    sum_grad_squared_scale_ = staticmethod(sum_grad_squared_scale_)


# Accuracy


@every_dtype
@given(
    B=st.sampled_from((0, 1, 2, 5, 33)),
    T=st.sampled_from((0, 1, 2, 3, 31, 33, 65, 300)),
    C=st.sampled_from((0, 1, 2, 15, 16, 63, 64, 65, 130)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    bias=st.booleans(),
    plain=st.booleans(),
    absolute=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(dtype, B, T, C, layouts, bias, plain, absolute, seed):
    inputs = [lay_out(x, layout) for x, layout in zip(make_inputs(B, T, C, dtype, seed), layouts, strict=True)]
    assert_right(inputs, dtype, bias=bias, plain=plain, absolute=absolute)


@every_dtype
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4095), (3, 2, 4097), (2, 1, 9000), (1, 1, 70_000), (40, 1, 3)], ids=str)
def test_several_ranges_of_columns(dtype, channels_first, shape):
    inputs = make_inputs(*shape, dtype)
    if channels_first:
        inputs[2:4] = [lay_out(x.transpose(1, 2), "contiguous").transpose(1, 2) for x in inputs[2:4]]
    assert_right(inputs, dtype)


@every_dtype
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("T", [511, 513, 5000, 50_176])
def test_long_sums_of_one_sign(dtype, channels_first, T):
    """Where a plain running sum would lose digits."""
    inputs = [x.abs() for x in make_inputs(1, T, 5, dtype)]
    if channels_first:
        inputs[2:4] = [lay_out(x.transpose(1, 2), "contiguous").transpose(1, 2) for x in inputs[2:4]]
    assert_right(inputs, dtype, plain=True)
    assert_right(inputs, dtype, plain=True, bias=True)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("T", [4, 1000, 100_000])
def test_float32_keeps_its_digits_however_long_the_sum(channels_first, T):
    """Of T ones and one 1/3: few roundings, whatever T is."""
    g = torch.ones(1, 3, T)
    g[:, :, T // 2] = 1 / 3
    g = g.transpose(1, 2) if channels_first else g.transpose(1, 2).contiguous()
    out = sum_grad_squared_scale_(torch.zeros(3), None, g)
    assert_accurate(out, g.double().sum(1).square().sum(0))


def test_it_is_the_sum_of_squared_gradients():
    """Against what it is for: autograd's gradients of the weight and bias of a norm layer, for every example."""
    norm, x = torch.nn.GroupNorm(2, 6).double(), torch.randn(4, 6, 3, 5, dtype=torch.float64)
    grads = torch.randn(4, 6, 3, 5, dtype=torch.float64)
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for example, grad in zip(x.split(1), grads.split(1), strict=True):
        gradients = torch.autograd.grad((norm(example) * grad).sum(), [norm.weight, norm.bias])
        expected += torch.stack(gradients).square() / 4
    normalised = torch.nn.functional.group_norm(x, 2).flatten(2).transpose(1, 2)
    out = torch.zeros(2, 6, dtype=torch.float64)
    sum_grad_squared_scale_(out[0], normalised, grads.flatten(2).transpose(1, 2), scale=1 / 4)
    sum_grad_squared_scale_(out[1], None, grads.flatten(2).transpose(1, 2), scale=1 / 4)
    assert_accurate(out, expected, size=expected + expected.median(), floor=1e-12)


def test_expanded_and_mixed_layouts():
    out, first, x, g, weights = make_inputs(3, 5, 7, torch.float32)
    expanded = torch.randn(3, 1, 1).expand(3, 5, 7)
    first_last = x.transpose(1, 2).contiguous().transpose(1, 2), g
    for a, b in ((expanded, g), (x, expanded), first_last, first_last[::-1], (expanded, expanded)):
        assert_right([out, first, a, b, weights], torch.float32)


# In place


@every_dtype
def test_it_adds_to_out_and_returns_it(dtype):
    out, first, x, g, weights = make_inputs(3, 4, 5, dtype)
    start, first_start = out.clone(), first.clone()
    for _ in range(2):
        assert sum_grad_squared_scale_(out, x, g, weights=weights, first=first) is out
    once, first_once = torch.zeros_like(out), torch.zeros_like(out)
    sum_grad_squared_scale_(once, x, g, weights=weights, first=first_once)
    assert_accurate(out, start.double() + 2 * once.double())
    assert_accurate(first, first_start.double() + 2 * first_once.double(), size=first_start.double().abs() + 10)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (0, 0, 5)], ids=str)
def test_no_examples_or_no_positions_add_nothing(shape):
    out, first, x, g, weights = make_inputs(*shape, torch.float32)
    out[0], out[1], first[0] = NAN, -0.0, INF
    before = bits(out).clone(), bits(first).clone()
    sum_grad_squared_scale_(out, x, g, weights=weights, first=first)
    assert torch.equal(bits(out), before[0]) and torch.equal(bits(first), before[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 1, 33), (3, 4, 33)], ids=str)
def test_nothing_but_out_and_first_is_written(layout, shape):
    places = [lay_out(x, layout) for x in make_inputs(*shape, torch.float32)]
    out, first, x, g, weights = places
    guards, values = [surroundings(p) for p in places], [p.clone() for p in places[2:]]
    expected = add(reference, [p.double() for p in places])
    sum_grad_squared_scale_(out, x, g, scale=0.3, weights=weights, first=first)
    assert_accurate(out, expected[0])
    assert_accurate(first, expected[1], size=expected[1].abs() + 1)
    assert all(torch.equal(surroundings(p), guard) for p, guard in zip(places, guards, strict=True))
    assert all(torch.equal(p, value) for p, value in zip(places[2:], values, strict=True))


def test_autograd_notices_the_changes_and_no_graph_is_built():
    out, first, x, g, weights = make_inputs(3, 4, 5, torch.float32)
    versions = out._version, first._version
    sum_grad_squared_scale_(out, x.requires_grad_(), g.requires_grad_(), weights=weights.requires_grad_(), first=first)
    assert out._version > versions[0] and first._version > versions[1]
    assert not out.requires_grad and not first.requires_grad
    with torch.inference_mode():
        assert_accurate(
            sum_grad_squared_scale_(out * 0, x, g), reference.sum_grad_squared_scale_(out * 0, x, g).double()
        )


# Hostile values


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 40), (3, 4, 40), (2, 600, 40)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_hostile_value_shows_in_its_own_column_only(shape, value, channels_first):
    out, first, x, g, weights = make_inputs(*shape, torch.float32)
    if channels_first:
        x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
    clean = add(operator, [out, first, x, g, weights])
    x[0, shape[1] // 2, 17] = value
    result = add(operator, [out, first, x, g, weights])
    others = torch.arange(40) != 17
    for one, other in zip(result, clean, strict=True):
        assert torch.equal(one[others], other[others])
    wanted = [abs(value), value * g[0, shape[1] // 2, 17].sign().item()]
    for one, expected in zip(result, wanted, strict=True):
        torch.testing.assert_close(one[17].item(), expected, equal_nan=True)


def test_infinities_and_zeros_behave_as_in_ieee():
    """inf * 0 is NaN, (-inf)^2 is inf, inf - inf is NaN, and a NaN in out stays."""
    x = torch.tensor([[[INF, -INF, 1.0, INF], [0.0, 1.0, 1.0, -INF]]])
    g = torch.tensor([[[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]])
    out = torch.tensor([0.0, 0.0, NAN, 0.0])
    for a, b in (
        (x, g),
        (x.transpose(1, 2).contiguous().transpose(1, 2), g.transpose(1, 2).contiguous().transpose(1, 2)),
    ):
        result = sum_grad_squared_scale_(out.clone(), a, b)
        torch.testing.assert_close(result, torch.tensor([NAN, INF, NAN, NAN]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("T", [1, 2, 600])
def test_only_the_results_range_counts(T):
    """Squares that float32 does not have, of factors and weights whose product it has."""
    ones = torch.ones(2, T, 3)
    for factor, scale, weight in ((1e25, 1e-30, 1e-10), (1e-25, 1e30, 1e15), (1e-20, 1.0, 1e30), (1e15, 1.0, 1e-20)):
        weights, out, first = torch.full((2,), weight), torch.zeros(3), torch.zeros(3)
        sum_grad_squared_scale_(out, ones * factor, ones, scale=scale, weights=weights, first=first)
        gradient = T * torch.tensor(factor).double()
        total = 2 * scale * torch.tensor(weight).double()
        assert_accurate(out, (total * gradient.square()).expand(3))
        assert_accurate(first, (total * gradient).expand(3))
    subnormal = sum_grad_squared_scale_(torch.zeros(3), None, ones * (1e-21 / T))
    assert_accurate(subnormal, torch.full((3,), 2e-42, dtype=torch.float64), size=torch.full((3,), 1e-38).double())
    assert (subnormal > 0).all()


def test_float16_products_do_not_overflow():
    x = torch.full((2, 3, 5), 60000.0, dtype=torch.float16)
    out = sum_grad_squared_scale_(torch.zeros(5), x, x)
    assert_accurate(out, torch.full((5,), 2 * (3 * 60_000.0**2) ** 2, dtype=torch.float64))


# Errors


Z = torch.zeros


@pytest.mark.parametrize(
    ("out", "x", "g", "options", "error", "message"),
    [
        (Z(3), Z(4, 5, 3).int(), Z(4, 5, 3).int(), {}, TypeError, "grad_outputs has dtype torch.int32.*float32"),
        (Z(3), Z(4, 5, 3), Z(4, 5, 3).double(), {}, TypeError, "out has dtype torch.float32.*must be torch.float64"),
        (Z(3).half(), None, Z(4, 5, 3).half(), {}, TypeError, "out has dtype torch.float16.*must be torch.float32"),
        (Z(3), Z(4, 5, 3).half(), Z(4, 5, 3), {}, TypeError, "inputs has dtype torch.float16.*must be torch.float32"),
        (Z(3), None, Z(4, 3), {}, ValueError, r"grad_outputs has shape \[4, 3\].*\[B, T, C\]"),
        (Z(3), Z(4, 1, 3), Z(4, 5, 3), {}, ValueError, r"inputs has shape \[4, 1, 3\].*\[4, 5, 3\]"),
        (Z(4), None, Z(4, 5, 3), {}, ValueError, r"out has shape \[4\].*\[C\] = \[3\]"),
        (Z(3, 1), None, Z(4, 5, 3), {}, ValueError, r"out has shape \[3, 1\]"),
        (Z(3), None, Z(4, 5, 3, device="meta"), {}, ValueError, "grad_outputs on meta.*one device"),
        (Z(3), Z(4, 5, 3, device="meta"), Z(4, 5, 3), {}, ValueError, "inputs on meta.*one device"),
        (Z(1).expand(3), None, Z(4, 5, 3), {}, ValueError, r"out has overlapping \(expanded\) memory"),
        (Z(3), None, Z(4, 5, 3), {"weights": Z(4).double()}, TypeError, "weights has dtype.*must be torch.float32"),
        (Z(3), None, Z(4, 5, 3), {"weights": Z(3)}, ValueError, r"weights has shape \[3\].*\[B\] = \[4\]"),
        (Z(3), None, Z(4, 5, 3), {"weights": Z(4, device="meta")}, ValueError, "weights is on meta"),
        (Z(3), None, Z(4, 5, 3), {"first": Z(3).half()}, TypeError, "first has dtype.*must be torch.float32"),
        (Z(3), None, Z(4, 5, 3), {"first": Z(3, 1)}, ValueError, r"first has shape \[3, 1\].*that of out, \[3\]"),
        (Z(3), None, Z(4, 5, 3), {"first": Z(3, device="meta")}, ValueError, "first is on meta"),
        (Z(3), None, Z(4, 5, 3), {"first": Z(1).expand(3)}, ValueError, "first has overlapping"),
    ],
)
def test_bad_arguments(out, x, g, options, error, message):
    with pytest.raises(error, match=message):
        sum_grad_squared_scale_(out, x, g + 1, **options)
    assert not out.any()


def test_first_must_not_be_out():
    out = torch.zeros(3)
    with pytest.raises(ValueError, match="first is out itself"):
        sum_grad_squared_scale_(out, None, torch.ones(4, 5, 3), first=out)
    assert not out.any()


# torch.compile, threads


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_as_one_graph(bias):
    """Both tensors made in the graph and ones passed in."""
    out, first, x, g, weights = make_inputs(3, 4, 5, torch.float32)

    def twice(out: Tensor, first: Tensor, g: Tensor) -> Tensor:
        a = None if bias else x
        sum_grad_squared_scale_(out, a, g, scale=0.5, weights=weights, first=first)
        return sum_grad_squared_scale_(torch.zeros_like(out), a, g, absolute=True) + 1

    expected = out.clone(), first.clone()
    wanted = twice(*expected, g)
    result = torch.compile(twice, fullgraph=True, backend="aot_eager")(out, first, g)
    assert torch.equal(result, wanted) and torch.equal(out, expected[0]) and torch.equal(first, expected[1])


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("shape", [(5, 300, 200), (40, 70, 3), (33, 1, 5000)], ids=str)
def test_the_number_of_threads_does_not_matter(shape, channels_first):
    inputs = make_inputs(*shape, torch.float32)
    if channels_first:
        inputs[2:4] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[2:4]]
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(add(operator, inputs))
    torch.set_num_threads(threads)
    for result, number in itertools.product(results[1:], (0, 1)):
        assert torch.equal(result[number], results[0][number])
