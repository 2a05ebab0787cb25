"""sum_grad_squared_embedding_ against float64: repeated tokens, layouts, moments, hostile values, foreign memory."""

import math

import pytest
import torch
from accuracy import assert_accurate, assert_as_accurate, bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast import reference, sum_grad_squared_embedding_

INF, NAN = math.inf, math.nan

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_inputs(B: int, T: int, H: int, V: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """out >= 0, as sums of squares are; first; tokens, some negative; grad_outputs; weights >= 0."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (V, H), (V, H), (B, T, H), (B,)
    out, first, g, weights = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    tokens = torch.randint(-1, V, (B, T), generator=generator)
    return [out.abs().to(wide), first.to(wide), tokens, g.to(dtype), weights.abs().to(wide)]


def add(library, inputs: list[Tensor], plain: bool = False, **options) -> list[Tensor]:
    """out and first after the call; `plain`: without weights and first."""
    out, first, tokens, g, weights = inputs
    out, first = out.clone(), first.clone()
    if not plain:
        options.update(weights=weights, first=first)
    library.sum_grad_squared_embedding_(out, tokens, g, scale=0.3, **options)
    return [out, first]


def assert_right(inputs: list[Tensor], dtype: torch.dtype, **options) -> None:
    """Errors relative to sums of magnitudes: the sum over repetitions may cancel."""

    def magnitudes(x: list[Tensor]) -> list[Tensor]:
        return add(reference, [t.abs() if t.is_floating_point() else t for t in x], **options)

    assert_as_accurate(lambda library, x: add(library, x, **options), inputs, dtype, scales=magnitudes)


class operator:
    sum_grad_squared_embedding_ = staticmethod(sum_grad_squared_embedding_)


# Accuracy


@every_dtype
@given(
    B=st.sampled_from((0, 1, 2, 5)),
    T=st.sampled_from((0, 1, 2, 3, 31, 70)),
    H=st.sampled_from((0, 1, 2, 15, 16, 63, 65, 130)),
    V=st.sampled_from((1, 2, 5, 40, 3000)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    narrow=st.booleans(),
    plain=st.booleans(),
    absolute=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(dtype, B, T, H, V, layouts, narrow, plain, absolute, seed):
    inputs = make_inputs(B, T, H, V, dtype, seed)
    inputs[2] = inputs[2].int() if narrow else inputs[2]
    inputs = [lay_out(x, layout) for x, layout in zip(inputs, layouts, strict=True)]
    assert_right(inputs, dtype, plain=plain, absolute=absolute)


@every_dtype
@pytest.mark.parametrize(
    ("B", "T", "H", "V"), [(2, 9, 4097, 3), (3, 900, 5, 2), (1, 5000, 3, 1), (2, 50, 4, 300_000)], ids=str
)
def test_wide_rows_many_repetitions_and_large_tables(dtype, B, T, H, V):
    assert_right(make_inputs(B, T, H, V, dtype), dtype)
    inputs = make_inputs(B, T, H, V, dtype)
    inputs[3] = inputs[3].abs()  # sums of one sign, where a plain running sum would lose digits
    assert_right(inputs, dtype, plain=True)


@pytest.mark.parametrize("V", [2**11, 2**11 + 1, 2**22 + 1], ids=str)
def test_tokens_that_differ_in_their_high_bits_only(V):
    """Of V - 1, 2^11 - 1, 2^11 and 0, each is a row of its own."""
    tokens = torch.tensor([[V - 1, 0, 2**11 - 1, min(2**11, V - 1), -1, -(2**62), V - 1]])
    out = sum_grad_squared_embedding_(torch.zeros(V, 1), tokens, torch.ones(1, 7, 1))
    counts = torch.bincount(tokens[tokens >= 0], minlength=V).square().unsqueeze(1)
    assert torch.equal(out, counts.float())


def test_repeated_tokens_are_summed_before_they_are_squared():
    tokens = torch.tensor([[2, 0, 2, -1], [2, 2, 1, 1]])
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, -7.0, 8.0, -8.0]]).unsqueeze(-1)
    out, first = torch.zeros(4, 1), torch.zeros(4, 1)
    sum_grad_squared_embedding_(out, tokens, g, weights=torch.tensor([1.0, 10.0]), first=first)
    assert out.flatten().tolist() == [4.0, 0.0, 16.0 + 40.0, 0.0]
    assert first.flatten().tolist() == [2.0, 0.0, 4.0 - 20.0, 0.0]
    absolute = sum_grad_squared_embedding_(torch.zeros(4, 1), tokens, g, absolute=True)
    assert absolute.flatten().tolist() == [2.0, 0.0, 4.0 + 2.0, 0.0]


def test_it_is_the_sum_of_squared_gradients():
    """Against what it is for: autograd's gradient of the table for every example, with a padding index."""
    table = torch.nn.Embedding(9, 5, padding_idx=3).double()
    tokens, grads = torch.randint(9, (4, 12)), torch.randn(4, 12, 5, dtype=torch.float64)
    expected = torch.zeros(9, 5, dtype=torch.float64)
    for y, grad in zip(tokens, grads, strict=True):
        (gradient,) = torch.autograd.grad((table(y) * grad).sum(), table.weight)
        expected += gradient.square() / 4
    out = torch.zeros(9, 5, dtype=torch.float64)
    sum_grad_squared_embedding_(out, tokens.masked_fill(tokens == 3, -1), grads, scale=1 / 4)
    assert_accurate(out, expected, size=expected + expected.median(), floor=1e-12)


# In place


@every_dtype
def test_it_adds_to_out_and_returns_it(dtype):
    out, first, tokens, g, weights = make_inputs(3, 4, 5, 6, dtype)
    start, first_start = out.clone(), first.clone()
    for _ in range(2):
        assert sum_grad_squared_embedding_(out, tokens, g, weights=weights, first=first) is out
    once, first_once = torch.zeros_like(out), torch.zeros_like(out)
    sum_grad_squared_embedding_(once, tokens, g, weights=weights, first=first_once)
    assert_accurate(out, start.double() + 2 * once.double())
    assert_accurate(first, first_start.double() + 2 * first_once.double(), size=first_start.double().abs() + 10)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (3, 0, 5, 6), (3, 4, 0, 6), (3, 4, 5, 6)], ids=str)
def test_no_examples_no_positions_or_skipped_tokens_add_nothing(shape):
    out, first, tokens, g, weights = make_inputs(*shape, torch.float32)
    if out.numel():
        out[0, 0], out[1, 1], first[0, 0] = NAN, -0.0, INF
    before = bits(out).clone(), bits(first).clone()
    sum_grad_squared_embedding_(out, tokens.clamp(max=-1), g * NAN, weights=weights, first=first)
    assert torch.equal(bits(out), before[0]) and torch.equal(bits(first), before[1])


def test_an_empty_table():
    out = torch.zeros(0, 5)
    sum_grad_squared_embedding_(out, torch.full((2, 3), -1), torch.ones(2, 3, 5))
    with pytest.raises(RuntimeError, match=r"tokens holds 0.*below V = 0"):
        sum_grad_squared_embedding_(out, torch.zeros(2, 3).long(), torch.ones(2, 3, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_but_out_and_first_is_written(layout):
    places = [lay_out(x, layout) for x in make_inputs(3, 9, 33, 7, torch.float32)]
    out, first, tokens, g, weights = places
    guards, values = [surroundings(p) for p in places], [p.clone() for p in places[2:]]
    expected = add(reference, [p.double() if p.is_floating_point() else p for p in places])
    sum_grad_squared_embedding_(out, tokens, g, scale=0.3, weights=weights, first=first)
    assert_accurate(out, expected[0], size=expected[0] + 1)
    assert_accurate(first, expected[1], size=expected[1].abs() + 1)
    assert all(torch.equal(surroundings(p), guard) for p, guard in zip(places, guards, strict=True))
    assert all(torch.equal(p, value) for p, value in zip(places[2:], values, strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_rows_that_do_not_occur_keep_their_bits(dtype):
    out, first, _, g, weights = make_inputs(2, 3, 5, 9, torch.float32)
    tokens = torch.tensor([[1, 4, 1], [4, -1, 7]], dtype=dtype)
    out[0], first[2], out[8] = NAN, -0.0, INF
    before = bits(out).clone(), bits(first).clone()
    sum_grad_squared_embedding_(out, tokens, g, weights=weights * INF, first=first)
    others = [0, 2, 3, 5, 6, 8]
    assert torch.equal(bits(out)[others], before[0][others]) and torch.equal(bits(first)[others], before[1][others])
    assert not out[[1, 4, 7]].isfinite().any()


def test_autograd_notices_the_changes_and_no_graph_is_built():
    out, first, tokens, g, weights = make_inputs(3, 4, 5, 6, torch.float32)
    versions = out._version, first._version
    sum_grad_squared_embedding_(out, tokens, g.requires_grad_(), weights=weights.requires_grad_(), first=first)
    assert out._version > versions[0] and first._version > versions[1]
    assert not out.requires_grad and not first.requires_grad
    with torch.inference_mode():
        result = sum_grad_squared_embedding_(out * 0, tokens, g)
        assert_accurate(result, reference.sum_grad_squared_embedding_(out * 0, tokens, g).double())


# Hostile values


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("T", [1, 5, 300])
def test_a_hostile_value_shows_in_its_own_element_only(value, T):
    out, first, tokens, g, weights = make_inputs(2, T, 40, 6, torch.float32)
    tokens[0, T // 2] = 5
    clean = add(operator, [out, first, tokens, g, weights])
    g[0, T // 2, 17] = value
    result = add(operator, [out, first, tokens, g, weights])
    for one, other in zip(result, clean, strict=True):
        assert (one != other).nonzero().tolist() == [[5, 17]]
    for one, expected in zip(result, (abs(value), value), strict=True):
        torch.testing.assert_close(one[5, 17].item(), expected, equal_nan=True)


@pytest.mark.parametrize("T", [1, 2, 600])
def test_only_the_results_range_counts(T):
    """Squares that float32 does not have, of gradients and weights whose product it has."""
    tokens, ones = torch.ones(2, T).long(), torch.ones(2, T, 3)
    for gradient, scale, weight in ((1e25, 1e-30, 1e-10), (1e-25, 1e30, 1e15), (1e-20, 1.0, 1e30), (1e15, 1.0, 1e-20)):
        weights, out, first = torch.full((2,), weight), torch.zeros(2, 3), torch.zeros(2, 3)
        sum_grad_squared_embedding_(out, tokens, ones * gradient, scale=scale, weights=weights, first=first)
        total, whole = 2 * scale * torch.tensor(weight).double(), T * torch.tensor(gradient).double()
        assert_accurate(out[1], (total * whole.square()).expand(3))
        assert_accurate(first[1], (total * whole).expand(3))
    subnormal = sum_grad_squared_embedding_(torch.zeros(2, 3), tokens, ones * (1e-21 / T))
    assert (subnormal[1] > 0).all() and (subnormal[1] < 3e-42).all()


# Errors


Z = torch.zeros
I = torch.zeros(4, 5).long()  # noqa: E741


@pytest.mark.parametrize(
    ("out", "tokens", "g", "options", "error", "message"),
    [
        (Z(6, 3), I, Z(4, 5, 3).int(), {}, TypeError, "grad_outputs has dtype torch.int32.*float32"),
        (Z(6, 3), I, Z(4, 5, 3).double(), {}, TypeError, "out has dtype torch.float32.*must be torch.float64"),
        (Z(6, 3).half(), I, Z(4, 5, 3).half(), {}, TypeError, "out has dtype torch.float16.*must be torch.float32"),
        (Z(6, 3), I.short(), Z(4, 5, 3), {}, TypeError, "tokens has dtype torch.int16.*int64 or int32"),
        (Z(6, 3), I.float(), Z(4, 5, 3), {}, TypeError, "tokens has dtype torch.float32"),
        (Z(6, 3), I[:3], Z(4, 5, 3), {}, ValueError, r"tokens has shape \[3, 5\] and grad_outputs \[4, 5, 3\]"),
        (Z(6, 3), I[0], Z(5, 3), {}, ValueError, r"tokens has shape \[5\].*\[B, T\]"),
        (Z(6, 4), I, Z(4, 5, 3), {}, ValueError, r"out has shape \[6, 4\].*\[V, H\] with H = 3"),
        (Z(3), I, Z(4, 5, 3), {}, ValueError, r"out has shape \[3\]"),
        (Z(6, 3), I.to("meta"), Z(4, 5, 3), {}, ValueError, "tokens is on meta.*one device"),
        (Z(6, 3), I.to("meta"), Z(4, 5, 3, device="meta"), {}, ValueError, "grad_outputs on meta.*one device"),
        (Z(1, 3).expand(6, 3), I, Z(4, 5, 3), {}, ValueError, r"out has overlapping \(expanded\) memory"),
        (Z(6, 3), I, Z(4, 5, 3), {"weights": Z(4).double()}, TypeError, "weights has dtype.*must be torch.float32"),
        (Z(6, 3), I, Z(4, 5, 3), {"weights": Z(4, 1)}, ValueError, r"weights has shape \[4, 1\].*\[B\] = \[4\]"),
        (Z(6, 3), I, Z(4, 5, 3), {"first": Z(6, 3).half()}, TypeError, "first has dtype.*must be torch.float32"),
        (Z(6, 3), I, Z(4, 5, 3), {"first": Z(3, 6)}, ValueError, r"first has shape \[3, 6\]: it must be \[6, 3\]"),
        (Z(6, 3), I, Z(4, 5, 3), {"first": Z(1, 3).expand(6, 3)}, ValueError, "first has overlapping"),
        (Z(6, 3), I + 6, Z(4, 5, 3), {}, RuntimeError, "tokens holds 6.*below V = 6"),
        (Z(6, 3), I.index_fill(1, torch.tensor(4), 2**40), Z(4, 5, 3), {}, RuntimeError, "tokens holds 1099511627776"),
        (Z(6, 3), (I + 6).int(), Z(4, 5, 3), {"first": Z(6, 3)}, RuntimeError, "tokens holds 6"),
    ],
)
def test_bad_arguments(out, tokens, g, options, error, message):
    with pytest.raises(error, match=message):
        sum_grad_squared_embedding_(out, tokens, g + 1, **options)
    assert not out.any() and not ("first" in options and options["first"].any())


# torch.compile, threads


def test_compiled_as_one_graph():
    """Both tensors made in the graph and ones passed in."""
    out, first, tokens, g, weights = make_inputs(3, 4, 5, 6, torch.float32)

    def twice(out: Tensor, first: Tensor, g: Tensor) -> Tensor:
        sum_grad_squared_embedding_(out, tokens, g, scale=0.5, weights=weights, first=first)
        return sum_grad_squared_embedding_(torch.zeros_like(out), tokens, g, absolute=True) + 1

    expected = out.clone(), first.clone()
    wanted = twice(*expected, g)
    result = torch.compile(twice, fullgraph=True, backend="aot_eager")(out, first, g)
    assert torch.equal(result, wanted) and torch.equal(out, expected[0]) and torch.equal(first, expected[1])


@pytest.mark.parametrize("shape", [(5, 300, 200, 400), (40, 70, 130, 2), (3, 20, 5000, 9)], ids=str)
def test_the_number_of_threads_does_not_matter(shape):
    inputs = make_inputs(*shape, torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(add(operator, inputs))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])
