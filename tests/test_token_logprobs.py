"""token_logprobs: accuracy, strides, confident tokens, ignored rows, hostile values, errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, assert_as_accurate, bits, leaf
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out
from torch import Tensor

from unlearn_fast import reference, token_logprobs

INF, NAN = math.inf, math.nan
IGNORE = -100

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def values_and_gradient(library, inputs: list[Tensor], **options) -> list[Tensor]:
    """log p, and the gradient of the logits for the given cotangent."""
    logits, labels, grad = inputs
    logits = logits.detach().requires_grad_()
    logp = library.token_logprobs(logits, labels, **options)
    return [logp.detach(), *torch.autograd.grad(logp, logits, grad.to(logp.dtype))]


def parts(library, inputs: list[Tensor]) -> list[Tensor]:
    """log p; the gradient in the label's column; the gradient in the others, for it is torch's only weakness."""
    logp, gradient = values_and_gradient(library, inputs)
    own = inputs[1].clamp(min=0).long().unsqueeze(-1)
    return [logp, gradient.gather(-1, own), gradient.scatter(-1, own, 0)]


def exact_parts(inputs: list[Tensor]) -> list[Tensor]:
    """The same in numpy's long double, by formulas that lose nothing as p -> 1; log_softmax in float64 does."""
    logits, labels, grad = (x.numpy() for x in inputs)
    rows, grad = logits.astype(np.longdouble), grad[..., None].astype(np.longdouble)
    ignored = labels[..., None] == IGNORE
    own = np.where(ignored, 0, labels[..., None])
    odds = np.exp(rows - np.take_along_axis(rows, own, -1))
    np.put_along_axis(odds, own, 0, -1)
    against = odds.sum(-1, keepdims=True)  # (1 - p) / p
    p = np.exp(rows - rows.max(-1, keepdims=True))
    others = -grad * p / p.sum(-1, keepdims=True)
    np.put_along_axis(others, own, 0, -1)
    results = -np.log1p(against)[..., 0], grad * against / (1 + against), others
    masks = ignored[..., 0], ignored, ignored
    return [torch.tensor(np.where(m, 0, x).astype(np.float64)) for x, m in zip(results, masks, strict=True)]


def assert_right(inputs: list[Tensor]) -> None:
    """log p and the label's gradient are right to the last digits; softmax of the others as nearly as torch's."""
    assert_as_accurate(parts, inputs, inputs[0].dtype, truth=exact_parts, beyond_torch=(0, 1))


class ours:
    """Our library's operator alone, where the truth is known otherwise."""

    token_logprobs = staticmethod(token_logprobs)


def make_inputs(leading: tuple[int, ...], V: int, dtype: torch.dtype, *, spread: float = 2.0, seed: int = 0):
    """Logits, labels, of which about a fifth is ignored, and cotangents.

    The logits are multiples of 1/8, so that their differences are exact in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*leading, V, generator=generator, dtype=torch.float64) * spread
    logits = ((logits * 8).round() / 8).to(dtype)
    labels = torch.randint(V, leading, generator=generator)
    labels[torch.rand(leading, generator=generator) < 0.2] = IGNORE
    grad = torch.randn(leading, generator=generator, dtype=torch.float64).to(dtype)
    return [logits, labels, grad]


# Accuracy


@every_dtype
@given(
    leading=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    V=st.sampled_from((1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 1023, 1025, 2500)),
    layout=st.sampled_from(LAYOUTS),
    label_dtype=st.sampled_from((torch.int64, torch.int32)),
    label_layout=st.sampled_from(LAYOUTS),
    spread=st.sampled_from((0.1, 2.0, 30.0)),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(dtype, leading, V, layout, label_dtype, label_layout, spread, seed):
    logits, labels, grad = make_inputs(leading, V, dtype, spread=spread, seed=seed)
    inputs = [lay_out(logits, layout), lay_out(labels.to(label_dtype), label_layout), grad]
    assert_right(inputs)


@every_dtype
def test_many_rows_and_a_large_vocabulary(dtype):
    """Several blocks a row, several rows a thread, and more rows than threads."""
    assert_right(make_inputs((3, 7), 32_003, dtype))
    assert_right(make_inputs((501,), 130, dtype))


@pytest.mark.parametrize("position", [0, 1, 1023, 1024, 1025, 2047, 2048])
def test_the_label_may_stand_anywhere_in_a_block(position):
    logits, _, grad = make_inputs((1,), 2049, torch.float32)
    assert_right([logits, torch.tensor([position]), grad])


@pytest.mark.parametrize("offset", [-(2.0**16), 1024.0, 2.0**16])
def test_a_common_offset_of_the_logits_costs_no_accuracy(offset):
    """The logits are multiples of 1/8, and stay exact."""
    logits, labels, grad = make_inputs((3, 4), 33, torch.float32)
    assert_right([logits + offset, labels, grad])


def test_expanded_logits():
    logits, labels, grad = make_inputs((4, 6), 33, torch.float32)
    inputs = [logits[:1, :1].expand(4, 6, 33), labels, grad]
    assert_right(inputs)
    assert_right([logits[..., :1].expand(4, 6, 33), labels, grad])


def test_results_have_the_documented_dtype_and_shape():
    for dtype in DTYPES:
        logits, labels, _ = make_inputs((2, 3), 5, dtype)
        logits.requires_grad_()
        logp = token_logprobs(logits, labels)
        assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert logp.shape == (2, 3)
        logp.sum().backward()
        assert logits.grad.dtype == dtype
        assert not reference.token_logprobs(logits.detach(), labels).requires_grad
        assert not token_logprobs(logits.detach(), labels).requires_grad


def test_gradcheck():
    logits, labels, _ = make_inputs((4, 3), 9, torch.float64)
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, labels), logits.requires_grad_())


# Confident tokens: 1 - p far below what 1 - exp(log p) could show


@pytest.mark.parametrize("distance", [10.0, 20.0, 30.0, 60.0, 80.0])
@pytest.mark.parametrize("V", [2, 5, 1500])
def test_confident_tokens_keep_value_and_gradient(V, distance):
    """All other logits are `distance` below the label's: 1 - p = k / (1 + k) with k = (V - 1) exp(-distance)."""
    logits, labels = torch.full((3, V), -distance), torch.tensor([0, V // 2, V - 1])
    logits[torch.arange(3), labels] = 0
    logits += 5  # the distance is still exact
    k = (V - 1) * math.exp(-distance)
    logp, gradient = values_and_gradient(ours, [logits, labels, torch.full((3,), 2.0)])
    assert_accurate(logp, torch.full((3,), -math.log1p(k), dtype=torch.float64))
    expected = torch.full((3, V), -2 * math.exp(-distance) / (1 + k), dtype=torch.float64)
    expected[torch.arange(3), labels] = 2 * k / (1 + k)
    assert_accurate(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_confident_tokens_in_16_bit(dtype):
    logits, labels = torch.zeros(2, 4, dtype=dtype), torch.tensor([1, 3])
    logits[torch.arange(2), labels] = 12
    k = 3 * math.exp(-12)
    logp, gradient = values_and_gradient(ours, [logits, labels, torch.ones(2)])
    assert_accurate(logp, torch.full((2,), -math.log1p(k), dtype=torch.float64))
    assert_accurate(gradient[torch.arange(2), labels], torch.full((2,), k / (1 + k), dtype=torch.float64))


def test_hopeless_tokens_keep_value_and_gradient():
    """p -> 0: log p is a plain difference and the label's gradient is the whole cotangent."""
    logits = torch.tensor([[0.0, -200.0, -200.0], [0.0, -1e4, 3e38]])
    logp, gradient = values_and_gradient(ours, [logits, torch.tensor([1, 0]), torch.tensor([1.0, -3.0])])
    assert logp.tolist() == [-200.0, -torch.tensor(3e38).item()]
    assert gradient.tolist() == [[-1.0, 1.0, 0.0], [-3.0, 0.0, 3.0]]


# Ignored rows


@every_dtype
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(dtype, inplace_backward):
    logits, labels, grad = make_inputs((2, 4), 6, dtype)
    labels[:] = 2
    for row, value in zip(((0, 1), (1, 0), (1, 3)), (NAN, INF, -INF), strict=True):
        labels[row], logits[row], grad[row] = IGNORE, value, NAN
    kept = labels != IGNORE
    x = leaf(logits)
    logp = token_logprobs(x * 1, labels, inplace_backward=inplace_backward)
    logp.backward(grad.to(logp.dtype))
    assert (bits(logp[~kept]) == 0).all() and (bits(x.grad[~kept]) == 0).all()
    clean = values_and_gradient(ours, [logits[kept], labels[kept], grad[kept]])
    assert torch.equal(logp[kept], clean[0]) and torch.equal(x.grad[kept], clean[1])


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 10**12])
def test_every_row_ignored(ignore_index):
    x = torch.full((3, 2, 5), NAN, requires_grad=True)
    logp = token_logprobs(x, torch.full((3, 2), ignore_index), ignore_index=ignore_index)
    logp.sum().backward()
    assert (logp == 0).all() and (x.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 0, 1), (1,), (7,)], ids=str)
def test_empty_and_single_rows(shape):
    x = torch.zeros(shape, requires_grad=True)
    logp = token_logprobs(x, torch.zeros(shape[:-1], dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == shape[:-1] and x.grad.shape == shape
    assert_accurate(logp, torch.full(shape[:-1], -math.log(shape[-1]), dtype=torch.float64))


def test_a_vocabulary_of_one_word_is_certain():
    x = torch.tensor([[3.0], [-1e30]], requires_grad=True)
    logp = token_logprobs(x, torch.tensor([0, 0]))
    logp.sum().backward()
    assert logp.tolist() == [0, 0] and x.grad.tolist() == [[0], [0]]


# Hostile values


HOSTILE = (0.0, -1.5, NAN, INF, -INF, 1e-45, 3e38, -3e38)


@pytest.mark.parametrize("V", [1, 2, 3])
def test_hostile_logits_behave_as_log_softmax(V):
    """Every combination of hostile logits: NaN, infinities and finite values stand where float64 torch has them."""
    logits = torch.tensor(list(itertools.product(HOSTILE, repeat=V)))
    for label in range(V):
        labels = torch.full(logits.shape[:1], label)
        for grad in (1.0, -2.0, 0.0, NAN, INF):
            inputs = [logits, labels, torch.full(labels.shape, grad)]
            exact = values_and_gradient(reference, [logits.double(), labels, inputs[2].double()])
            logp, gradient = values_and_gradient(ours, inputs)
            assert_accurate(logp, exact[0], what=f"log p of {label}")
            if math.isfinite(grad):
                assert_accurate(gradient, exact[1], what=f"gradient for cotangent {grad}")
            else:  # inf * 0 or inf - inf, in an order that is not part of the contract
                assert not gradient[logits.isnan().any(-1)].isfinite().any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 5, 1023, 1024, 3000])
def test_a_hostile_logit_shows_in_its_own_row_only(position, value):
    logits, labels, grad = make_inputs((3,), 3001, torch.float32)
    labels[:] = 7
    clean = values_and_gradient(ours, [logits, labels, grad])
    logits[1, position] = value
    logp, gradient = values_and_gradient(ours, [logits, labels, grad])
    for row in (0, 2):
        assert torch.equal(logp[row], clean[0][row]) and torch.equal(gradient[row], clean[1][row])
    if value == -INF:
        assert logp[1].isfinite() and gradient[1].isfinite().all() and gradient[1, position] == 0
    else:
        assert logp[1].isnan() and gradient[1].isnan().all()


def test_subnormal_cotangents_are_not_flushed():
    logits, grad = torch.zeros(1, 2), torch.tensor([1e-40])
    _, gradient = values_and_gradient(ours, [logits, torch.tensor([0]), grad])
    assert_accurate(gradient, torch.tensor([[0.5, -0.5]], dtype=torch.float64) * grad.item())


# Errors


@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**62), 2**31])
@pytest.mark.parametrize("where", [0, 3])
def test_a_label_outside_the_vocabulary_raises(label, where):
    labels = torch.tensor([0, 1, 2, 3])
    labels[where] = label
    with pytest.raises(RuntimeError, match=rf"labels holds {label} at row {where}.*\[0, 5\) or ignore_index"):
        token_logprobs(torch.zeros(4, 5), labels)


def test_a_wrong_label_in_the_backward_writes_nothing():
    logits, none = torch.randn(3, 4), (None,) * 3
    before, stats = logits.clone(), [torch.zeros(3)] * 4
    labels = torch.tensor([0, 1, 4])
    with pytest.raises(RuntimeError, match="labels holds 4 at row 2"):
        torch.ops.unlearn_fast.token_logprobs_backward_(torch.ones(3), *none, logits, labels, *stats, IGNORE, 0.0, 1.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (
            torch.zeros(3, 4, dtype=torch.int64),
            torch.zeros(3).long(),
            TypeError,
            "logits has dtype torch.int64.*float32",
        ),
        (
            torch.zeros(3, 4, dtype=torch.complex64),
            torch.zeros(3).long(),
            TypeError,
            "logits has dtype torch.complex64",
        ),
        (torch.zeros(3, 4), torch.zeros(3), TypeError, "labels has dtype torch.float32.*int64 or int32"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool), TypeError, "labels has dtype torch.bool"),
        (torch.zeros(3, 4), torch.zeros(4).long(), ValueError, r"labels has shape \[4\] and logits \[3, 4\]"),
        (torch.zeros(3, 4), torch.zeros(3, 1).long(), ValueError, r"labels has shape \[3, 1\]"),
        (torch.zeros(3, 4), torch.tensor(0), ValueError, r"labels has shape \[\]"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, r"logits \[\]"),
        (torch.zeros(3, 4), torch.zeros(3, device="meta").long(), ValueError, "labels is on meta and logits on cpu"),
    ],
)
def test_bad_arguments(logits, labels, error, message):
    with pytest.raises(error, match=message):
        token_logprobs(logits, labels)


def test_a_second_derivative_raises():
    logits, labels, _ = make_inputs((3,), 4, torch.float64)
    x = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(token_logprobs(x, labels).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        gradient.sum().backward()


# torch.compile, threads


@pytest.mark.parametrize(
    "options", [{}, {"ignore_index": 1}, {"inplace_backward": True}], ids=["plain", "ignore_index", "inplace_backward"]
)
def test_compiled_as_one_graph(options):
    inputs = make_inputs((2, 5), 7, torch.float32)
    inputs[1].clamp_(min=0)

    class compiled:
        token_logprobs = staticmethod(torch.compile(token_logprobs, fullgraph=True, backend="aot_eager"))

    expected = values_and_gradient(ours, inputs, ignore_index=options.get("ignore_index", IGNORE))
    for result, wanted in zip(values_and_gradient(compiled, inputs, **options), expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.slow
def test_compiled_by_inductor():
    """Strided logits and surrounding arithmetic, which inductor fuses and lays out on its own."""
    inputs = make_inputs((2, 5), 7, torch.float32)

    def loss(x: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
        return (token_logprobs((x * 2)[:, :-1], labels[:, 1:]).exp() * grad[:, 1:]).sum()

    expected, result = (leaf(inputs[0]) for _ in range(2))
    loss(expected, *inputs[1:]).backward()
    torch.compile(loss, fullgraph=True)(result, *inputs[1:]).backward()
    torch.testing.assert_close(result.grad, expected.grad, rtol=1e-6, atol=1e-7)  # inductor's exp is its own


def test_the_number_of_threads_does_not_change_a_bit():
    inputs = make_inputs((97,), 3000, torch.float32)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(values_and_gradient(ours, inputs))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], others, strict=True))
