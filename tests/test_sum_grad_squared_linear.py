"""sum_grad_squared_linear_ against float64: shapes, strides, tiles, hostile values, and what it must not write."""

import math

import pytest
import torch
from accuracy import assert_accurate, assert_as_accurate, bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast import reference, sum_grad_squared_linear_

INF, NAN = math.inf, math.nan

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def make_inputs(leading: tuple[int, ...], O: int, I: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:  # noqa: E741
    """out >= 0, as sums of squares are; inputs; grad_outputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (O, I), (*leading, I), (*leading, O)
    out, a, g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [out.abs().to(wide(dtype)), a.to(dtype), g.to(dtype)]


def add(library, inputs: list[Tensor], scale: float = 0.3) -> list[Tensor]:
    out, a, g = inputs
    return [library.sum_grad_squared_linear_(out.clone(), a, g, scale=scale)]


def terms(inputs: list[Tensor], scale: float = 0.3) -> list[Tensor]:
    """What errors are relative to: the inner sum over positions may cancel, the outer ones may not."""
    out, a, g = inputs
    return add(reference, [out.abs(), a.abs(), g.abs()], abs(scale))


def assert_right(inputs: list[Tensor], dtype: torch.dtype) -> None:
    # An inner sum of T products, squared: the usual bound is 2 T ulps; both orders of summation stay far below it.
    assert_as_accurate(add, inputs, dtype, scales=terms)


# Accuracy


@every_dtype
@given(
    leading=st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 5), st.sampled_from((0, 1, 2, 3, 8, 17)))),
    O=st.sampled_from((0, 1, 2, 5, 6, 7, 12, 13, 24, 33, 96, 97)),
    I=st.sampled_from((0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 65)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(dtype, leading, O, I, layouts, seed):  # noqa: E741
    inputs = make_inputs(leading, O, I, dtype, seed)
    assert_right([lay_out(x, layout) for x, layout in zip(inputs, layouts, strict=True)], dtype)


@every_dtype
@pytest.mark.parametrize(
    ("leading", "O", "I"),
    [
        ((2, 255), 3, 5),
        ((2, 256), 3, 5),
        ((2, 257), 3, 5),
        ((2, 1000), 13, 33),
        ((1, 3), 97, 257),
        ((3, 2), 200, 520),
        ((2, 5), 1, 1500),
        ((2, 5), 1500, 1),
        ((700,), 20, 40),
        ((700, 1), 20, 40),
        ((1, 1), 100, 300),
    ],
    ids=str,
)
def test_several_tiles_and_pieces(dtype, leading, O, I):  # noqa: E741
    assert_right(make_inputs(leading, O, I, dtype), dtype)


def test_expanded_inputs():
    """A bias: its inputs are all ones, one value in memory."""
    out, _, g = make_inputs((4, 6), 5, 3, torch.float32)
    assert_right([out, torch.ones(()).expand(4, 6, 3), g], torch.float32)
    assert_right([out, torch.ones(4, 1, 3).expand(4, 6, 3), g[:1].expand(4, 6, 5)], torch.float32)


def test_it_is_the_sum_of_squared_gradients():
    """Against what it is for: autograd's weight gradient of every example."""
    layer, x = torch.nn.Linear(7, 5, bias=False).double(), torch.randn(4, 6, 7, dtype=torch.float64)
    weights = torch.randn(4, 6, 5, dtype=torch.float64)
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for example, weight in zip(x, weights, strict=True):
        (gradient,) = torch.autograd.grad((layer(example) * weight).sum(), layer.weight)
        expected += gradient.square() / 4
    out = torch.zeros(5, 7, dtype=torch.float64)
    sum_grad_squared_linear_(out, x, weights, scale=1 / 4)
    assert_accurate(out, expected, size=expected + expected.median())


@pytest.mark.parametrize("leading", [(3,), (3, 1), (3, 4)], ids=str)
def test_small_and_large_factors_whose_product_is_ordinary(leading):
    """The square is of the product: (1e20 * 1e-22)^2 is 1e-4, though float32 has neither (1e20)^2 nor (1e-22)^2."""
    out, a, g = make_inputs(leading, 5, 7, torch.float32)
    for shift in (1e20, 1e-20, 1e4):
        inputs = [out * 0, a * shift, g * (1e-2 / shift)]
        assert_as_accurate(add, inputs, torch.float32, scales=terms)
    inputs = [out * 0, a * 1e4, g * 1e-22]  # squares near 1e-36, still normal numbers
    assert_as_accurate(add, inputs, torch.float32, scales=terms)


# Weights, first moments, magnitudes


def with_moments(leading: tuple[int, ...], O: int, I: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:  # noqa: E741
    """out, inputs, grad_outputs, weights, first."""
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(leading[0], generator=generator, dtype=torch.float64)
    first = torch.randn(O, I, generator=generator, dtype=torch.float64)
    return [*make_inputs(leading, O, I, dtype, seed), weights.to(wide(dtype)), first.to(wide(dtype))]


def moments(absolute: bool, given: tuple[bool, bool] = (True, True)):
    """`given`: whether weights and first are."""

    def run(library, inputs: list[Tensor]) -> list[Tensor]:
        out, a, g, weights, first = inputs
        out, first = out.clone(), first.clone()
        library.sum_grad_squared_linear_(
            out, a, g, scale=0.3, absolute=absolute, weights=weights if given[0] else None,
            first=first if given[1] else None,
        )  # fmt: skip
        return [out, first]

    return run


@every_dtype
@given(
    leading=st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 40), st.sampled_from((1, 2, 8, 17, 300)))),
    O=st.sampled_from((1, 6, 12, 13, 33, 97)),
    I=st.sampled_from((1, 15, 32, 33, 65)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    absolute=st.booleans(),
    given_=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_moments(dtype, leading, O, I, layouts, absolute, given_, seed):  # noqa: E741
    inputs = with_moments(leading, O, I, dtype, seed)
    places = [lay_out(x, layout) for x, layout in zip(inputs, layouts, strict=True)]
    run = moments(absolute, given_)
    assert_as_accurate(run, places, dtype, scales=lambda x: run(reference, [y.abs() for y in x]))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("leading", [(5,), (5, 1), (5, 3)], ids=str)
def test_weights_of_any_size(leading, absolute):
    """Neither w nor G^2 alone is ordinary, their product is; a zero weight leaves its example out."""
    out, a, g, weights, first = with_moments(leading, 5, 7, torch.float32)
    run = moments(absolute)
    small, large = (
        [out * 0, a * 1e-12, g, weights * 1e20, first * 0],
        [out * 0, a, g * 1e12, weights * 1e-20, first * 0],
    )
    for inputs in (small, large):
        assert_as_accurate(run, inputs, torch.float32, scales=lambda x: run(reference, [y.abs() for y in x]))
    g[0] *= 1e15
    weights[0] = 0
    result = run(torch_ops, [out, a, g, weights, first])
    expected = run(
        reference, [x[1:].double() if x is not out and x is not first else x for x in (out, a, g, weights, first)]
    )
    for ours, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, wanted.float())


def test_first_and_weights_must_fit():
    out, a, g = make_inputs((4, 3), 2, 3, torch.float32)
    before = out.clone()
    wrong = [
        (dict(first=Z(3, 2)), ValueError, r"first has shape \[3, 2\]: it must be \[2, 3\]"),
        (dict(first=Z(2, 3).double()), TypeError, "first has dtype torch.float64: it must be torch.float32"),
        (dict(first=Z(2, 3, device="meta")), ValueError, "first is on meta"),
        (dict(first=Z(1, 3).expand(2, 3)), ValueError, r"first has overlapping \(expanded\) memory"),
        (dict(first=out), ValueError, "first shares memory with out"),
        (dict(weights=Z(3)), ValueError, r"weights has shape \[3\]: it must be \[B\] = \[4\]"),
        (dict(weights=Z(4, 1)), ValueError, r"weights has shape \[4, 1\]"),
        (dict(weights=Z(4).double()), TypeError, "weights has dtype torch.float64: it must be torch.float32"),
        (dict(weights=Z(4, device="meta")), ValueError, "weights is on meta"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            sum_grad_squared_linear_(out, a, g, **options)
        assert torch.equal(out, before)


# In place


@every_dtype
def test_it_adds_to_out_and_returns_it(dtype):
    out, a, g = make_inputs((3, 4), 5, 7, dtype)
    start = out.clone()
    assert sum_grad_squared_linear_(out, a, g) is out
    once = out.clone()
    sum_grad_squared_linear_(out, a, g)
    assert_accurate(out - start, 2 * (once - start).double(), size=out.double())


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 1e-30, 1e30])
def test_scale(scale):
    def run(library, inputs):
        return add(library, inputs, scale)

    inputs = make_inputs((3, 4), 5, 7, torch.float32)
    assert_as_accurate(run, inputs, torch.float32, scales=lambda x: terms(x, scale))


@pytest.mark.parametrize("leading", [(0,), (0, 4), (3, 0), (0, 0)], ids=str)
def test_no_examples_or_no_positions_add_nothing(leading):
    out, a, g = make_inputs(leading, 5, 7, torch.float32)
    out[0, 0], out[1, 1] = NAN, -0.0
    before = bits(out).clone()
    sum_grad_squared_linear_(out, a, g)
    assert torch.equal(bits(out), before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(3,), (3, 4)], ids=str)
def test_nothing_but_out_is_written(layout, leading):
    out, a, g = make_inputs(leading, 13, 33, torch.float32)
    (expected,) = add(reference, [out.double(), a.double(), g.double()])
    places = [lay_out(x, layout) for x in (out, a, g)]
    guards, values = [surroundings(x) for x in places], [x.clone() for x in places[1:]]
    sum_grad_squared_linear_(*places, scale=0.3)
    assert_accurate(places[0], expected)
    assert all(torch.equal(surroundings(x), guard) for x, guard in zip(places, guards, strict=True))
    assert all(torch.equal(x, value) for x, value in zip(places[1:], values, strict=True))


def test_autograd_notices_the_change():
    out, a, g = make_inputs((3, 4), 5, 7, torch.float32)
    version = out._version
    x = torch.ones_like(out, requires_grad=True)
    loss = (x * out).sum()
    sum_grad_squared_linear_(out, a, g)
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_builds_no_graph():
    out, a, g = make_inputs((3, 4), 5, 7, torch.float32)
    sum_grad_squared_linear_(out, a.requires_grad_(), g.requires_grad_())
    assert not out.requires_grad


def test_in_inference_mode():
    inputs = make_inputs((3, 4), 5, 7, torch.float32)
    (expected,) = add(reference, inputs)
    with torch.inference_mode():
        (result,) = add(torch_ops, inputs)
    assert_accurate(result, expected.double(), size=terms(inputs)[0].double())


class torch_ops:
    sum_grad_squared_linear_ = staticmethod(sum_grad_squared_linear_)


# Hostile values


@pytest.mark.parametrize("leading", [(3,), (3, 1), (3, 4), (2, 300)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_hostile_value_shows_in_its_own_column_only(leading, value):
    out, a, g = make_inputs(leading, 20, 40, torch.float32)
    (clean,) = add(torch_ops, [out, a, g])
    a[(0,) * len(leading) + (17,)] = value
    (result,) = add(torch_ops, [out, a, g])
    others = torch.arange(40) != 17
    assert torch.equal(result[:, others], clean[:, others])
    assert not result[:, 17].isfinite().any()
    assert result[:, 17].isinf().all() or math.isnan(value)


def test_infinities_and_zeros_behave_as_in_ieee():
    """inf * 0 is NaN, (-inf)^2 is inf, and a NaN in out stays."""
    a, g = torch.tensor([[[INF, -INF, 1.0, NAN]]]), torch.tensor([[[0.0, 1.0]]])
    out = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, NAN, 0.0]])
    expected = torch.tensor([[NAN, NAN, 0.0, NAN], [INF, INF, NAN, NAN]])
    for copies in (1, 2):  # one position an example takes another path than several
        result = out.clone()
        padding = torch.zeros(1, copies - 1, 1)
        sum_grad_squared_linear_(
            result, torch.cat([a, padding.expand(1, -1, 4)], 1), torch.cat([g, padding.expand(1, -1, 2)], 1)
        )
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_subnormal_squares_are_not_flushed():
    a, g = torch.full((1, 2, 1), 1e-10), torch.full((1, 2, 1), 1e-10)
    out = torch.zeros(1, 1)
    sum_grad_squared_linear_(out, a, g)
    assert_accurate(out, (2 * a[0, :1].double() * g[0, :1].double()).square())
    assert out.item() > 0


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float64, 1e200)], ids=str)
def test_large_factors_in_different_examples(dtype, size):
    """Every example's gradient is 0, though the columns hold numbers whose product overflows."""
    a, g = torch.tensor([[size], [0.0]], dtype=dtype), torch.tensor([[0.0], [size]], dtype=dtype)
    out = torch.ones(1, 1, dtype=dtype)
    sum_grad_squared_linear_(out, a, g)
    assert out.item() == 1


def test_float16_products_do_not_overflow():
    a = torch.full((2, 3, 1), 60000.0, dtype=torch.float16)
    out = torch.zeros(1, 1)
    sum_grad_squared_linear_(out, a, a)
    assert_accurate(out, torch.full((1, 1), 2 * (3 * a[0, 0].double().item() ** 2) ** 2, dtype=torch.float64))


# Errors


Z = torch.zeros


@pytest.mark.parametrize(
    ("out", "a", "g", "error", "message"),
    [
        (Z(2, 3), Z(4, 3).long(), Z(4, 2).long(), TypeError, "inputs has dtype torch.int64.*float32"),
        (Z(2, 3), Z(4, 3), Z(4, 2).double(), TypeError, "grad_outputs has dtype torch.float64.*torch.float32"),
        (Z(2, 3).double(), Z(4, 3), Z(4, 2), TypeError, "out has dtype torch.float64.*must be torch.float32"),
        (Z(2, 3).half(), Z(4, 3).half(), Z(4, 2).half(), TypeError, "out has dtype torch.float16.*torch.float32"),
        (Z(2, 3), Z(4, 3).double(), Z(4, 2).double(), TypeError, "out has dtype torch.float32.*torch.float64"),
        (Z(2, 3), Z(4, 3), Z(5, 2), ValueError, r"inputs has shape \[4, 3\] and grad_outputs \[5, 2\]"),
        (Z(2, 3), Z(4, 5, 3), Z(4, 6, 2), ValueError, r"\[B, T, I\] and \[B, T, O\]"),
        (Z(2, 3), Z(4, 1, 3), Z(4, 2), ValueError, r"inputs has shape \[4, 1, 3\] and grad_outputs \[4, 2\]"),
        (Z(2, 3), Z(4, 5, 6, 3), Z(4, 5, 6, 2), ValueError, r"\[B, I\] and \[B, O\]"),
        (Z(2, 3), Z(3), Z(2), ValueError, r"inputs has shape \[3\]"),
        (Z(3, 2), Z(4, 3), Z(4, 2), ValueError, r"out has shape \[3, 2\].*\[O, I\] = \[2, 3\]"),
        (Z(6), Z(4, 3), Z(4, 2), ValueError, r"out has shape \[6\]"),
        (Z(2, 3), Z(4, 3, device="meta"), Z(4, 2), ValueError, "inputs on meta.*one device"),
        (Z(1, 3).expand(2, 3), Z(4, 3), Z(4, 2), ValueError, r"out has overlapping \(expanded\) memory"),
        (Z(9).as_strided((2, 3), (1, 1)), Z(4, 3), Z(4, 2), ValueError, "out has overlapping"),
    ],
)
def test_bad_arguments(out, a, g, error, message):
    with pytest.raises(error, match=message):
        sum_grad_squared_linear_(out, a + 1 if a.device.type == "cpu" else a, g + 1)
    assert not out.any()


# torch.compile, threads


@pytest.mark.parametrize("leading", [(3,), (3, 4)], ids=str)
def test_compiled_as_one_graph(leading):
    """Both a tensor made in the graph and one passed in."""
    out, a, g = make_inputs(leading, 5, 7, torch.float32)

    def twice(out: Tensor, a: Tensor, g: Tensor) -> Tensor:
        sum_grad_squared_linear_(out, a, g, scale=0.5)
        return sum_grad_squared_linear_(torch.zeros_like(out), a, g) + 1

    expected = out.clone()
    wanted = twice(expected, a, g)
    result = torch.compile(twice, fullgraph=True, backend="aot_eager")(out, a, g)
    assert torch.equal(result, wanted) and torch.equal(out, expected)


def test_the_number_of_threads_does_not_matter():
    """Another number of threads may choose other tiles, never another order of summation within an element."""
    threads = torch.get_num_threads()
    for leading in ((5, 300), (50, 7), (600,)):
        inputs, results = with_moments(leading, 200, 300, torch.float32), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(moments(absolute=False)(torch_ops, inputs))
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))
