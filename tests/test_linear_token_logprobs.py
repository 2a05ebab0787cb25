"""linear_token_logprobs against float64, and its promise that the [N, V] logits never exist."""

import itertools
import math

import pytest
import torch
from accuracy import assert_as_accurate, bits
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out
from torch import Tensor
from torch.profiler import profile

from unlearn_fast import linear_token_logprobs, reference

NAMES = ("hidden", "weight", "bias")
IGNORE = -100

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class ours:
    """Our library's operator alone, where the truth is known otherwise."""

    linear_token_logprobs = staticmethod(linear_token_logprobs)


def make_inputs(leading: tuple[int, ...], H: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Hidden states, weight, bias, labels, of which about a fifth is ignored, and cotangents."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*leading, H), (V, H), (V,), leading)
    hidden, weight, bias, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    labels = torch.randint(V, leading, generator=generator)
    labels[torch.rand(leading, generator=generator) < 0.2] = IGNORE
    return [hidden.to(dtype), (weight / max(H, 1) ** 0.5).to(dtype), bias.to(dtype), labels, grad.to(dtype)]


def values_and_gradients(library, inputs: list[Tensor], needs=NAMES, **options) -> list[Tensor]:
    """log p, and the gradients of those named in `needs`; without the bias where it is None."""
    leaves = {n: x.detach().requires_grad_(n in needs) for n, x in zip(NAMES, inputs, strict=False)}
    labels, grad = inputs[3:]
    bias = {"bias": leaves["bias"]} if "bias" in needs or options.pop("bias", True) else {}
    logp = library.linear_token_logprobs(leaves["hidden"], leaves["weight"], labels, **bias, **options)
    return [logp.detach(), *torch.autograd.grad(logp, [leaves[n] for n in needs], grad.to(logp.dtype))]


def sizes(inputs: list[Tensor]) -> list[Tensor]:
    """What errors are relative to: the magnitudes of the terms of every sum, since the terms may cancel."""
    hidden, weight, bias, labels, grad = inputs
    terms = hidden.abs() @ weight.abs().T + bias.abs()
    kept = labels != IGNORE
    d_logits = logits_gradient(hidden @ weight.T + bias, labels, grad)
    spread = (d_logits.abs() * (1 + terms.amax(-1, keepdim=True))).reshape(-1, len(weight))
    rows = hidden.abs().reshape(-1, hidden.shape[-1])
    largest = terms.amax(-1).masked_fill(~kept, 0)
    return [largest, (spread @ weight.abs()).view_as(hidden), spread.T @ rows, spread.sum(0)]


def logits_gradient(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    logits.requires_grad_()
    return torch.autograd.grad(reference.token_logprobs(logits, labels), logits, grad)[0]


def assert_right(run, inputs: list[Tensor], scales=sizes) -> None:
    """Within an ulp of the inputs' dtype, in which the matrix products round their results, or as near as torch."""
    dtype = inputs[0].dtype
    assert_as_accurate(run, inputs, dtype, scales=scales, floor=torch.finfo(dtype).eps)


# Accuracy


@every_dtype
@settings(max_examples=30)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    H=st.sampled_from((1, 2, 7, 16, 33)),
    V=st.sampled_from((1, 2, 15, 64, 130)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    label_dtype=st.sampled_from((torch.int64, torch.int32)),
    rows_in_chunk=st.sampled_from((0, 1, 3, 1000)),
    seed=st.integers(0, 1000),
)
def test_any_shape_strides_and_chunks(dtype, leading, H, V, layouts, label_dtype, rows_in_chunk, seed):
    *tensors, grad = make_inputs(leading, H, V, dtype, seed)
    tensors[3] = tensors[3].to(label_dtype)
    inputs = [*map(lay_out, tensors, layouts), grad]
    chunk_bytes = max(1, rows_in_chunk * V * inputs[0].element_size())

    def run(library, inputs):
        return values_and_gradients(library, inputs, chunk_bytes=chunk_bytes)

    assert_right(run, inputs)


@every_dtype
def test_a_larger_problem(dtype):
    def run(library, inputs):
        return values_and_gradients(library, inputs, chunk_bytes=20_000)

    assert_right(run, make_inputs((3, 17), 64, 1031, dtype))


@pytest.mark.parametrize("needs", [n for k in (1, 2, 3) for n in itertools.combinations(NAMES, k)], ids="+".join)
def test_any_subset_of_gradients(needs):
    inputs = make_inputs((5,), 4, 7)
    every = dict(zip(("logp", *NAMES), values_and_gradients(ours, inputs), strict=True))
    some = values_and_gradients(ours, inputs, needs)
    for result, name in zip(some, ("logp", *needs), strict=True):
        assert torch.equal(result, every[name])


def test_without_bias():
    def run(library, inputs):
        return values_and_gradients(library, inputs, NAMES[:2], bias=False)

    inputs = make_inputs((5,), 4, 7)
    inputs[2].zero_()
    assert_right(run, inputs, lambda x: sizes(x)[:3])


def test_gradients_keep_the_dtypes_of_their_tensors():
    for dtype in DTYPES:
        logp, *gradients = values_and_gradients(ours, make_inputs((4,), 3, 5, dtype))
        assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(g.dtype == dtype for g in gradients)


def test_gradcheck():
    hidden, weight, bias, labels, _ = make_inputs((4, 2), 3, 5, torch.float64)

    def logp(*tensors: Tensor) -> Tensor:
        hidden, weight, bias = tensors
        return linear_token_logprobs(hidden, weight, labels, bias=bias, chunk_bytes=3 * 5 * 8)

    assert torch.autograd.gradcheck(logp, [x.requires_grad_() for x in (hidden, weight, bias)])


def test_confident_tokens_keep_their_gradient():
    """The other logits are 40 below the label's, and 1 - p = 4 exp(-40) shows in every gradient."""
    weight, labels = torch.tensor([[0.0], [40.0], [0.0], [0.0], [0.0]]), torch.tensor([1])
    tensors = [torch.ones(1, 1), weight, torch.zeros(5), labels, torch.ones(1)]
    k = 4 * math.exp(-40)
    logp, d_hidden, _, d_bias = values_and_gradients(ours, tensors)
    assert logp.item() == pytest.approx(-k, rel=1e-6)
    assert d_bias.tolist() == pytest.approx([-k / 4, k, -k / 4, -k / 4, -k / 4], rel=1e-6)
    assert d_hidden.item() == pytest.approx(40 * k, rel=1e-6)


def test_autocast_does_not_change_the_result():
    """The dtype is that of the tensors: forward and backward must see the same logits."""
    inputs = make_inputs((5,), 64, 100)
    expected = values_and_gradients(ours, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = values_and_gradients(ours, inputs)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# Ignored rows


@every_dtype
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_ignored_rows_count_for_nothing_whatever_they_hold(dtype, chunk_bytes):
    inputs = make_inputs((7,), 3, 5, dtype)
    hidden, _, _, labels, grad = inputs
    labels[:] = torch.arange(7) % 5
    labels[[0, 3, 6]], hidden[[0, 3, 6]], grad[[0, 3, 6]] = IGNORE, math.nan, math.inf
    logp, d_hidden, d_weight, d_bias = values_and_gradients(ours, inputs, chunk_bytes=chunk_bytes)
    assert (bits(logp[[0, 3, 6]]) == 0).all() and (bits(d_hidden[[0, 3, 6]]) == 0).all()
    kept = [1, 2, 4, 5]
    clean = [hidden[kept], *inputs[1:3], labels[kept], grad[kept]]
    expected = values_and_gradients(ours, clean, chunk_bytes=chunk_bytes)
    for result, wanted in zip((logp[kept], d_hidden[kept], d_weight, d_bias), expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("ignore_index", [IGNORE, -1, 0, 4])
def test_every_row_ignored(ignore_index):
    inputs = make_inputs((2, 3), 4, 5)
    inputs[0].fill_(math.nan)
    inputs[3].fill_(ignore_index)
    assert all((x == 0).all() for x in values_and_gradients(ours, inputs, ignore_index=ignore_index))


def test_nan_and_infinity_pass_through():
    inputs = make_inputs((4,), 3, 5)
    inputs[3][:] = 1
    inputs[0][1, 0], inputs[0][2, 1] = math.nan, math.inf
    logp, d_hidden, *_ = values_and_gradients(ours, inputs)
    exact = reference.linear_token_logprobs(*inputs[:2], inputs[3], bias=inputs[2])
    assert torch.equal(logp.isnan(), exact.isnan()) and torch.equal(d_hidden.isnan().any(-1), exact.isnan())


# Memory


def allocations(function) -> tuple[object, int, int]:
    """What `function` returns, its largest allocation, and the most that it held at a time, in bytes."""
    with profile(profile_memory=True) as recorded:
        result = function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return result, max(sizes), max(itertools.accumulate(sizes))


@pytest.mark.parametrize("ignored", [False, True], ids=["every row", "some rows ignored"])
@pytest.mark.parametrize("rows_in_chunk", [1, 5])
def test_the_logits_never_exist(rows_in_chunk, ignored):
    """N = 64, V = 5000, H = 2: all logits are 1.28 MB, the weight 40 kB, a chunk's logits 20 kB a row."""
    hidden, weight, _, labels, _ = make_inputs((64,), 2, 5000)
    labels = labels.masked_fill(labels == IGNORE, 0) if not ignored else labels
    hidden.requires_grad_(), weight.requires_grad_()
    chunk, of_weight = rows_in_chunk * 5000 * 4, weight.nbytes
    small = 8192  # results, statistics and selections of 64 rows

    logp, largest, peak = allocations(lambda: linear_token_logprobs(hidden, weight, labels, chunk_bytes=chunk))
    assert largest <= chunk and peak <= chunk + small
    _, largest, peak = allocations(lambda: torch.autograd.grad(logp.sum(), (hidden, weight)))
    assert largest <= max(chunk, of_weight)
    assert peak <= chunk + 2 * of_weight + small


def test_the_whole_at_once_where_the_cap_allows():
    hidden, weight, _, labels, _ = make_inputs((64,), 2, 5000)
    _, largest, _ = allocations(lambda: linear_token_logprobs(hidden, weight, labels.clamp(min=0)))
    assert largest == 64 * 5000 * 4


# Errors


F, L = torch.zeros, torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((F(2, 3).long(), F(5, 3), L), {}, TypeError, "hidden has dtype torch.int64.*float32"),
        ((F(2, 3), F(5, 3), F(2)), {}, TypeError, "labels has dtype torch.float32.*int64 or int32"),
        ((F(3, 3), F(5, 3), L), {}, ValueError, r"labels has shape \[2\] and hidden \[3, 3\]"),
        ((F(2, 3), F(3, 5), L), {}, ValueError, r"weight has shape \[3, 5\].*\[V, H\] with H = 3"),
        ((F(2, 3), F(3), L), {}, ValueError, r"weight has shape \[3\]"),
        ((F(2, 3), F(5, 3), L), {"bias": F(4)}, ValueError, r"bias has shape \[4\].*\[V\] with V = 5"),
        ((F(2, 3), F(5, 3), L), {"bias": F(5, 1)}, ValueError, r"bias has shape \[5, 1\]"),
        ((F(2, 3), F(5, 3).double(), L), {}, ValueError, "weight is torch.float64.*must be torch.float32"),
        ((F(2, 3), F(5, 3), L), {"bias": F(5).half()}, ValueError, "bias is torch.float16.*must be torch.float32"),
        ((F(2, 3), F(5, 3, device="meta"), L), {}, ValueError, "weight is torch.float32 on meta.*on cpu"),
        ((F(2, 3), F(5, 3), L), {"chunk_bytes": 0}, ValueError, "chunk_bytes is 0: it must be at least 1"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_token_logprobs(*arguments, **options)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_outside_the_vocabulary_raises(label, chunk_bytes):
    with pytest.raises(RuntimeError, match=rf"labels holds {label} at row .*\[0, 5\)"):
        linear_token_logprobs(F(4, 3), F(5, 3), torch.tensor([0, 4, label, IGNORE]), chunk_bytes=chunk_bytes)


def test_a_second_derivative_raises():
    hidden, weight, _, labels, _ = make_inputs((3,), 2, 4)
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(linear_token_logprobs(hidden, weight, labels).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        gradient.sum().backward()


# torch.compile


@pytest.mark.parametrize("needs", [("hidden",), NAMES], ids="+".join)
def test_compiled_as_one_graph(needs):
    inputs = make_inputs((2, 5), 3, 7)

    class compiled:
        linear_token_logprobs = staticmethod(torch.compile(linear_token_logprobs, fullgraph=True, backend="aot_eager"))

    expected = values_and_gradients(ours, inputs, needs, chunk_bytes=100)
    results = values_and_gradients(compiled, inputs, needs, chunk_bytes=100)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
