"""token_kl: accuracy, a teacher in its own dtype, the penalty of UNDIAL, hostile values, in place, errors."""

import itertools
import math

import pytest
import torch
from accuracy import assert_accurate, assert_as_accurate, bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out
from torch import Tensor

from unlearn_fast import reference, token_kl

INF, NAN = math.inf, math.nan
IGNORE = -100
OPTIONS = (
    {},
    {"temperature": 0.7},
    {"softcap": 3.0, "label_penalty": 2.5},
    {"softcap": 30.0, "temperature": 2.0, "label_penalty": -1.0},
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class ours:
    token_kl = staticmethod(token_kl)


def make_inputs(leading: tuple[int, ...], V: int, dtype: torch.dtype, *, seed: int = 0, near: bool = False):
    """Logits, the teacher's, labels, of which about a fifth is ignored, and cotangents."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (torch.randn(*leading, V, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    if near:
        teacher = logits + 0.01 * teacher
    labels = torch.randint(V, leading, generator=generator)
    labels[torch.rand(leading, generator=generator) < 0.2] = IGNORE
    grad = torch.randn(leading, generator=generator, dtype=torch.float64)
    return [logits.to(dtype), teacher.to(dtype), labels, grad.to(dtype)]


def value_and_gradient(library, inputs: list[Tensor], **options) -> list[Tensor]:
    logits, teacher, labels, grad = inputs
    logits = logits.detach().requires_grad_()
    kl = library.token_kl(logits, teacher, labels, **options)
    return [kl.detach(), *torch.autograd.grad(kl, logits, grad.to(kl.dtype))]


def assert_right(inputs: list[Tensor], **options) -> None:
    """Errors relative to what is summed: the terms of the divergence, and p and q, may cancel."""

    def sizes(x: list[Tensor]) -> list[Tensor]:
        logits, teacher, labels, grad = x
        softcap, temperature = options.get("softcap"), options.get("temperature", 1.0)
        z, w = ((softcap * torch.tanh(t / softcap) if softcap else t) / temperature for t in (logits, teacher))
        own = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1])
        w = w - options.get("label_penalty", 0.0) * own
        size = 1 + z.abs().amax(-1) + w.abs().amax(-1)
        p, q = z.softmax(-1), w.softmax(-1)
        of_gradient = (p + q) * (grad.abs() * size).unsqueeze(-1) / temperature
        return [size, of_gradient]

    def run(library, x):
        return value_and_gradient(library, x, **options)

    assert_as_accurate(run, inputs, inputs[0].dtype, scales=sizes)


# Accuracy


@every_dtype
@given(
    leading=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    V=st.sampled_from((1, 2, 3, 15, 16, 33, 511, 512, 513, 1025)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    options=st.sampled_from(OPTIONS),
    near=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_strides_and_options(dtype, leading, V, layouts, options, near, seed):
    logits, teacher, labels, grad = make_inputs(leading, V, dtype, seed=seed, near=near)
    assert_right([lay_out(logits, layouts[0]), lay_out(teacher, layouts[1]), labels, grad], **options)


@every_dtype
@every_option
def test_rows_of_several_segments(dtype, options):
    assert_right(make_inputs((2, 3), 40_001, dtype), **options)


@pytest.mark.parametrize(("dtype", "teacher_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_the_teacher_has_a_dtype_of_its_own(dtype, teacher_dtype):
    logits, teacher, labels, grad = make_inputs((3, 4), 33, dtype)
    teacher = teacher.to(teacher_dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = value_and_gradient(ours, [logits, teacher, labels, grad])
    expected = value_and_gradient(ours, [logits, teacher.to(wide), labels, grad])
    assert result[0].dtype == wide and result[1].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_gradcheck():
    logits, teacher, labels, _ = make_inputs((4, 3), 9, torch.float64)
    for options in OPTIONS:
        assert torch.autograd.gradcheck(lambda z, o=options: token_kl(z, teacher, labels, **o), logits.requires_grad_())


def test_agrees_with_torchs_kl_div():
    logits, teacher, _, _ = make_inputs((3, 4), 50, torch.float64)
    p, q = logits.log_softmax(-1), teacher.log_softmax(-1)
    expected = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(token_kl(logits, teacher), expected)


@every_dtype
def test_the_same_logits_diverge_by_exactly_nothing(dtype):
    logits, _, labels, grad = make_inputs((3, 4), 700, dtype)
    kl, gradient = value_and_gradient(ours, [logits, logits.clone(), labels, grad], softcap=5.0)
    assert (kl == 0).all() and (gradient == 0).all()


def test_the_penalty_is_that_of_undial():
    """Released form: the one-hot of the label, times the penalty, is taken from the teacher's logits."""
    logits, teacher, labels, _ = make_inputs((3, 4), 9, torch.float64)
    labels.clamp_(min=0)
    target = (teacher - 3.0 * torch.nn.functional.one_hot(labels, 9)).softmax(-1)
    cross_entropy = -(target * logits.log_softmax(-1)).sum(-1)
    entropy = -(target * target.log()).sum(-1)
    torch.testing.assert_close(token_kl(logits, teacher, labels, label_penalty=3.0), cross_entropy - entropy)


# Labels


@every_dtype
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(dtype, inplace_backward):
    logits, teacher, labels, _ = make_inputs((2, 4), 6, dtype)
    labels[:] = 2
    for row, value in zip(((0, 1), (1, 0), (1, 3)), (NAN, INF, -INF), strict=True):
        labels[row], logits[row], teacher[row] = IGNORE, value, value
    ignored, x = labels == IGNORE, logits.requires_grad_()
    kl = token_kl(x * 1, teacher, labels, inplace_backward=inplace_backward, label_penalty=1.0)
    kl.sum().backward()
    assert (bits(kl[ignored]) == 0).all() and (bits(x.grad[ignored]) == 0).all()
    assert (kl[~ignored] > 0).all() and (x.grad[~ignored] != 0).all()


@pytest.mark.parametrize("shift", [False, True])
def test_without_labels_every_row_counts(shift):
    logits, teacher, _, _ = make_inputs((2, 5), 6, torch.float32)
    expected = token_kl(logits, teacher, torch.ones(2, 5, dtype=torch.int64))
    kl = token_kl(logits, teacher, shift=shift)
    assert torch.equal(kl[:, : 4 if shift else 5], expected[:, : 4 if shift else 5])
    assert not shift or (kl[:, -1] == 0).all()
    torch.testing.assert_close(kl, reference.token_kl(logits, teacher, shift=shift))


def test_shift_uses_the_next_label():
    logits, teacher, labels, _ = make_inputs((2, 5), 6, torch.float32)
    labels.clamp_(min=0)
    kl = token_kl(logits, teacher, labels, label_penalty=2.0, shift=True)
    assert torch.equal(kl[:, :-1], token_kl(logits[:, :-1], teacher[:, :-1], labels[:, 1:], label_penalty=2.0))


# Hostile values


HOSTILE = (0.0, -1.5, NAN, INF, -INF)


@pytest.mark.parametrize("V", [1, 2])
def test_hostile_logits_behave_as_the_formula(V):
    """Every combination, of both tensors: NaN, infinities and finite values stand where float64 torch has them."""
    rows = list(itertools.product(HOSTILE, repeat=2 * V))
    logits, teacher = torch.tensor(rows).split(V, dim=1)
    labels, ones = torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows))
    exact = value_and_gradient(reference, [logits.double(), teacher.double(), labels, ones.double()])
    kl, gradient = value_and_gradient(ours, [logits, teacher, labels, ones])
    assert_accurate(kl, exact[0], size=exact[0].abs().clamp(min=1))
    finite = exact[0].isfinite()
    assert_accurate(gradient[finite], exact[1][finite], size=torch.ones_like(exact[1][finite]))


@pytest.mark.parametrize("V", [40, 40_000])
def test_a_token_that_only_the_teacher_allows_costs_infinity(V):
    logits, teacher = torch.randn(2, V), torch.randn(2, V)
    logits[0, 7], teacher[1, 7] = -INF, -INF
    kl = token_kl(logits, teacher)
    assert kl[0] == INF and kl[1].isfinite()
    logits[:, :-5] = -INF
    assert (token_kl(logits, teacher) == INF).all()
    teacher[:, :-5] = -INF
    torch.testing.assert_close(token_kl(logits, teacher), token_kl(logits[:, -5:], teacher[:, -5:]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (1,), (7,), (2, 1)], ids=str)
def test_empty_and_single_rows(shape):
    x = torch.zeros(shape, requires_grad=True)
    kl = token_kl(x, torch.zeros(shape))
    kl.sum().backward()
    assert kl.shape == shape[:-1] and x.grad.shape == shape and (kl == 0).all()


# In place, threads


@every_option
def test_in_place_gives_the_same_bits_in_the_logits_memory(options):
    logits, teacher, labels, grad = make_inputs((3, 4), 700, torch.float32)
    _, expected = value_and_gradient(ours, [logits, teacher, labels, grad], **options)
    z, kept = logits.requires_grad_() * 1, teacher.clone()
    (gradient,) = torch.autograd.grad(token_kl(z, teacher, labels, inplace_backward=True, **options), z, grad)
    assert gradient.data_ptr() == z.data_ptr()
    assert torch.equal(bits(gradient), bits(expected)) and torch.equal(teacher, kept)


def test_in_place_refuses_what_is_still_needed():
    x, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1])
    z = x * 1
    with pytest.raises(ValueError, match="overwrite teacher_logits, which share memory"):
        token_kl(z[:2], z[1:3], labels, inplace_backward=True)
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        token_kl(x[:2], torch.zeros(2, 3), labels, inplace_backward=True)
    kl = token_kl(z, torch.zeros(4, 3), inplace_backward=True).sum()
    kl.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten by an earlier backward"):
        kl.backward()


@pytest.mark.parametrize("N", [1, 97])
def test_the_number_of_threads_does_not_change_a_bit(N):
    inputs = make_inputs((N,), 50_000 if N < 10 else 3000, torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(value_and_gradient(ours, inputs))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], others, strict=True))


# Errors, torch.compile


X, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.long(), X, Y), {}, TypeError, "logits has dtype torch.int64"),
        ((X, X.long(), Y), {}, TypeError, "teacher_logits has dtype torch.int64"),
        ((X, X[:2], Y), {}, ValueError, r"teacher_logits has shape \[2, 4\]: it must be \[3, 4\]"),
        ((X, X, Y[:2]), {}, ValueError, r"labels has shape \[2\] and logits \[3, 4\]"),
        ((X, X, X[:, 0]), {}, TypeError, "labels has dtype torch.float32"),
        ((X, X.to("meta"), Y), {}, ValueError, "teacher_logits is on meta and logits on cpu"),
        ((X, X), {"label_penalty": 1.0}, ValueError, "a penalty needs labels"),
        ((X, X, Y), {"label_penalty": INF}, ValueError, "label_penalty is inf: it must be finite"),
        ((X, X, Y), {"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ((X, X, Y), {"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ((X, X, Y + 4), {}, RuntimeError, r"labels holds 4 at row 0.*\[0, 4\)"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        token_kl(*arguments, **options)


def test_a_second_derivative_raises():
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_kl(x, X).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "shift": True, "label_penalty": 1.0}], ids=str)
def test_compiled_as_one_graph(options):
    inputs = make_inputs((2, 5), 7, torch.float32)

    class compiled:
        token_kl = staticmethod(torch.compile(token_kl, fullgraph=True, backend="aot_eager"))

    expected = value_and_gradient(ours, inputs, **options)
    results = value_and_gradient(compiled, inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
