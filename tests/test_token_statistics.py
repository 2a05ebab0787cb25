"""token_statistics, and softcap, temperature and shift: accuracy, every combination of cotangents, hostile values."""

import itertools
import math

import numpy as np
import pytest
import torch
from accuracy import FLOOR, assert_accurate, assert_as_accurate, bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out
from torch import Tensor

from unlearn_fast import _library, linear_token_logprobs, reference, token_logprobs, token_statistics

INF, NAN = math.inf, math.nan
IGNORE = -100
DIFFERENTIABLE = ("logp", "lse", "entropy", "mean_logit")
SCALINGS = ({}, {"temperature": 0.7}, {"softcap": 3.0}, {"softcap": 30.0, "temperature": 2.0})

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=str)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_inputs(leading: tuple[int, ...], V: int, dtype: torch.dtype, *, seed: int = 0, spread: float = 2.0):
    """Logits, labels, of which about a fifth is ignored, and a cotangent for each differentiable statistic."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*leading, V, generator=generator, dtype=torch.float64) * spread).to(dtype)
    labels = torch.randint(V, leading, generator=generator)
    labels[torch.rand(leading, generator=generator) < 0.2] = IGNORE
    grads = torch.randn(4, *leading, generator=generator, dtype=torch.float64).to(dtype)
    return [logits, labels, grads]


def statistics_and_gradient(library, inputs: list[Tensor], names=DIFFERENTIABLE, **options) -> list[Tensor]:
    logits, labels, grads = inputs
    logits = logits.detach().requires_grad_()
    result = library.token_statistics(logits, labels, **options)
    chosen = [getattr(result, n) for n in names]
    cotangents = [grads[DIFFERENTIABLE.index(n)].to(c.dtype) for n, c in zip(names, chosen, strict=True)]
    return [*(x.detach() for x in result), *torch.autograd.grad(chosen, logits, cotangents)]


def sizes(inputs: list[Tensor], **options) -> list[Tensor]:
    """What errors are relative to: each output is a sum, whose terms are of the size of z and log V, and may cancel."""
    logits, labels, grads = inputs
    softcap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    z = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    one = (1 + math.log(z.shape[-1]) + z.abs().amax(-1)).masked_fill(labels == IGNORE, 1)
    terms = grads.abs().sum(0) * one * one / temperature
    p = z.softmax(-1)
    own = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1])
    of_gradient = terms.unsqueeze(-1) * (p + own + 1 / logits.shape[-1])
    hit = one if not options else one * 1e9  # z that differ in float64 may round to one
    return [one, one, one, one, one, hit, of_gradient]


def assert_right(inputs: list[Tensor], names=DIFFERENTIABLE, **options) -> None:
    def run(library, inputs):
        return statistics_and_gradient(library, inputs, names, **options)

    assert_as_accurate(run, inputs, inputs[0].dtype, scales=lambda x: sizes(x, **options))


# Accuracy


@every_dtype
@given(
    leading=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    V=st.sampled_from((1, 2, 3, 15, 16, 33, 511, 512, 513, 1025)),
    layout=st.sampled_from(LAYOUTS),
    scaling=st.sampled_from(SCALINGS),
    spread=st.sampled_from((0.1, 2.0, 20.0)),
    seed=st.integers(0, 1000),
)
def test_any_shape_strides_and_scaling(dtype, leading, V, layout, scaling, spread, seed):
    logits, labels, grads = make_inputs(leading, V, dtype, seed=seed, spread=spread)
    assert_right([lay_out(logits, layout), labels, grads], **scaling)


@every_dtype
@every_scaling
def test_rows_of_several_segments(dtype, scaling):
    """More than the columns that one thread takes at a time."""
    assert_right(make_inputs((2, 3), 40_001, dtype), **scaling)


@pytest.mark.parametrize(
    "names", [n for k in range(1, 5) for n in itertools.combinations(DIFFERENTIABLE, k)], ids="+".join
)
@pytest.mark.parametrize("scaling", SCALINGS[::3], ids=str)
def test_every_combination_of_cotangents(names, scaling):
    assert_right(make_inputs((3, 4), 37, torch.float32), names, **scaling)


@every_scaling
def test_gradcheck(scaling):
    logits, labels, _ = make_inputs((4, 3), 9, torch.float64)

    def statistics(z: Tensor) -> tuple[Tensor, ...]:
        return token_statistics(z, labels, **scaling)[:4]

    assert torch.autograd.gradcheck(statistics, logits.requires_grad_())


def test_statistics_are_the_plain_ones():
    """The label's log-probability has the bits of the call without statistics up to rounding, and its own gradient."""
    logits, labels, _ = make_inputs((5,), 700, torch.float32)
    result = token_statistics(logits, labels)
    assert torch.equal(result.logp, token_logprobs(logits, labels))
    assert not result.max_logit.requires_grad and not result.hit.requires_grad
    kept = labels != IGNORE
    assert torch.equal(result.max_logit[kept], logits.amax(-1)[kept])
    assert torch.equal(result.hit[kept] == 1, logits.argmax(-1)[kept] == labels[kept])


def test_hit_counts_ties():
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 3.0, 3.0]])
    assert token_statistics(logits, torch.tensor([2, 2])).hit.tolist() == [1, 0]
    assert token_statistics(logits * 1e4, torch.tensor([2, 2]), softcap=3.0).hit.tolist() == [1, 1]


@pytest.mark.parametrize("distance", [10.0, 30.0, 80.0])
def test_confident_rows_keep_their_entropy(distance):
    """One logit 0, four -distance: lse log(1 + k), entropy log(1 + k) + distance k / (1 + k), k = 4 exp(-distance)."""
    logits = torch.full((1, 5), -distance)
    logits[0, 3] = 0
    k = 4 * math.exp(-distance)
    result = token_statistics(logits.requires_grad_(), torch.tensor([3]))
    expected = {"logp": -math.log1p(k), "lse": math.log1p(k), "entropy": math.log1p(k) + distance * k / (1 + k)}
    for name, value in expected.items():
        assert_accurate(getattr(result, name).detach(), torch.tensor([value], dtype=torch.float64), what=name)


def test_saturated_softcap_keeps_its_derivative():
    """1 - tanh^2 has no digits of its own there in float32: 4 e / (1 + e)^2 with e = exp(-2 x / softcap) has."""
    u = torch.tensor([[0.0, 5.0, 12.0, -20.0, 40.0, 1e30, -INF]])
    x = (3 * u).requires_grad_()
    token_statistics(x, torch.tensor([0]), softcap=3.0).mean_logit.sum().backward()
    e = np.exp(-2 * np.abs(u.numpy().astype(np.longdouble)))
    exact = torch.tensor((4 * e / (1 + e) ** 2 / 7).astype(np.float64))
    assert_accurate(x.grad, exact, floor=2 * FLOOR * torch.finfo(torch.float32).eps)


# Ignored rows, hostile values


@every_dtype
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(dtype, inplace_backward):
    logits, labels, _ = make_inputs((2, 4), 6, dtype)
    labels[:] = 2
    for row, value in zip(((0, 1), (1, 0), (1, 3)), (NAN, INF, -INF), strict=True):
        labels[row], logits[row] = IGNORE, value
    ignored = labels == IGNORE
    x = logits.requires_grad_()
    result = token_statistics(x * 1, labels, softcap=5.0, temperature=2.0, inplace_backward=inplace_backward)
    assert all((bits(r[ignored]) == 0).all() for r in result)
    sum(r.sum() for r in result[:4]).backward()
    assert (bits(x.grad[ignored]) == 0).all() and (x.grad[~ignored] != 0).any(-1).all()


HOSTILE = (0.0, -1.5, NAN, INF, -INF, 3e38)


@pytest.mark.parametrize("V", [1, 2, 3])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_hostile_logits_behave_as_the_formulas(V, softcap):
    """Every combination: NaN, infinities and finite values stand where float64 torch has them."""
    logits = torch.tensor(list(itertools.product(HOSTILE, repeat=V)))
    mixed = logits.isnan().any(-1) & (logits == INF).any(-1)  # the largest of NaN and inf: no part of the contract
    for label in range(V):
        labels = torch.full(logits.shape[:1], label)
        inputs = [logits, labels, torch.ones(4, *labels.shape)]
        exact = statistics_and_gradient(reference, [logits.double(), labels, inputs[2].double()], softcap=softcap)
        ours = statistics_and_gradient(_Ours, inputs, softcap=softcap)
        names = ("logp", "lse", "entropy", "mean_logit", "max_logit", "hit", "gradient")
        for name, result, wanted in zip(names, ours, exact, strict=True):
            if name in ("max_logit", "hit", "mean_logit"):
                result, wanted = result[~mixed], wanted[~mixed]
            if name == "mean_logit":  # a sum beyond float32 is infinite there
                within = wanted.abs() * V < 3.4e38
                result, wanted = result[within], wanted[within]
            if name == "gradient" and softcap:  # 1 - tanh^2 of 3e38 or inf is 0 in either
                wanted = wanted.masked_fill(wanted.abs() < 1e-30, 0)
            assert_accurate(result, wanted, size=wanted.abs().clamp(min=1), what=f"{name} of {label}")


class _Ours:
    token_statistics = staticmethod(token_statistics)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (1,), (7,), (2, 1)], ids=str)
def test_empty_and_single_rows(shape):
    x = torch.zeros(shape, requires_grad=True)
    result = token_statistics(x, torch.zeros(shape[:-1], dtype=torch.int64))
    sum(r.sum() for r in result[:4]).backward()
    assert x.grad.shape == shape and all(r.shape == shape[:-1] for r in result)
    assert (result.hit == 1).all()
    assert_accurate(result.entropy.detach(), torch.full(shape[:-1], math.log(shape[-1]), dtype=torch.float64))


# In place, threads, shift


@every_scaling
def test_in_place_gives_the_same_bits(scaling):
    logits, labels, grads = make_inputs((3, 4), 700, torch.float32)
    results = []
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        z = x * 1
        rows = token_statistics(z, labels, inplace_backward=inplace, **scaling)
        (gradient,) = torch.autograd.grad(list(rows[:4]), z, list(grads))
        assert (gradient.data_ptr() == z.data_ptr()) == inplace
        results.append(gradient)
    assert torch.equal(bits(results[0]), bits(results[1]))


@pytest.mark.parametrize("N", [1, 3, 97])
def test_the_number_of_threads_does_not_change_a_bit(N):
    """Few rows are split over threads, many are spread over them."""
    inputs = make_inputs((N,), 50_000 if N < 10 else 3000, torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(statistics_and_gradient(_Ours, inputs, softcap=5.0))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("shape", [(2, 5, 7), (4, 7), (3, 1, 7), (2, 0, 7)], ids=str)
def test_shift_scores_position_t_on_label_t_plus_1(shape):
    logits = torch.randn(shape)
    labels = torch.randint(7, shape[:-1])
    kept = labels.clone()
    expected = token_logprobs(logits[..., :-1, :], labels[..., 1:])
    for scores in (
        token_logprobs(logits, labels, shift=True),
        token_statistics(logits, labels, shift=True).logp,
        reference.token_logprobs(logits, labels, shift=True),
        linear_token_logprobs(logits, torch.eye(7), labels, shift=True),
    ):
        torch.testing.assert_close(scores[..., :-1], expected)
        assert scores.shape == labels.shape and (scores[..., -1:] == 0).all()
    assert torch.equal(labels, kept)


def test_shift_copies_no_logits():
    logits, labels = torch.randn(2, 8, 1000), torch.randint(1000, (2, 8))
    with torch.profiler.profile(profile_memory=True) as recorded:
        token_logprobs(logits, labels, shift=True)
    events = recorded.profiler.kineto_results.events()
    assert max(e.nbytes() for e in events if e.name() == "[memory]") < 1000


@every_scaling
def test_linear_token_logprobs_scales_its_logits(scaling):
    hidden, weight, labels = torch.randn(2, 5, 16), torch.randn(33, 16), torch.randint(33, (2, 5))
    hidden.requires_grad_(), weight.requires_grad_()
    expected = token_logprobs(hidden @ weight.T, labels, **scaling)
    result = linear_token_logprobs(hidden, weight, labels, chunk_bytes=33 * 4 * 3, **scaling)
    torch.testing.assert_close(result, expected)
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(result.sum(), (hidden, weight)), wanted)


# Errors, torch.compile


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0: it must be finite and above 0, or None"),
        ({"softcap": -3.0}, "softcap is -3.0"),
        ({"softcap": INF}, "softcap is inf"),
        ({"softcap": NAN}, "softcap is nan"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be finite and above 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": NAN}, "temperature is nan"),
    ],
)
def test_bad_options(options, message):
    logits, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for function in (token_logprobs, token_statistics):
        with pytest.raises(ValueError, match=message):
            function(logits, labels, **options)
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(logits, torch.zeros(5, 4), labels, **options)


def test_shift_needs_an_axis():
    with pytest.raises(ValueError, match=r"labels has shape \[\].*\[..., T\]"):
        token_logprobs(torch.zeros(4), torch.tensor(0), shift=True)


def test_a_second_derivative_raises():
    x = torch.randn(3, 4, requires_grad=True)
    statistics = token_statistics(x, torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(statistics.entropy.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("names", [("logp",), ("entropy", "lse"), DIFFERENTIABLE], ids="+".join)
def test_compiled_as_one_graph(names):
    inputs = make_inputs((2, 5), 7, torch.float32)

    class compiled:
        token_statistics = staticmethod(torch.compile(token_statistics, fullgraph=True, backend="aot_eager"))

    options = {"softcap": 3.0, "temperature": 0.5, "shift": True}
    expected = statistics_and_gradient(_Ours, inputs, names, **options)
    results = statistics_and_gradient(compiled, inputs, names, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# The exponential underneath


@pytest.mark.skipif("native" in _library.missing, reason="the compiled part is not built")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_is_right_to_2_ulp(dtype):
    """Over the whole range where it is used, subnormal results included."""
    lowest = -104.0 if dtype == np.float32 else -746.0
    generator = np.random.default_rng(0)
    x = np.concatenate([np.linspace(lowest - 1, 1, 2_000_003), generator.uniform(-1, 1, 1_000_003)]).astype(dtype)
    x = np.concatenate([x, np.array([0, -0.0, -1e-30, np.finfo(dtype).tiny, -np.inf, lowest * 100], dtype)])
    ours = x.copy()
    _library.native.exponentials(ours)
    exact = np.exp(x.astype(np.longdouble))
    ulp = np.spacing(np.maximum(exact.astype(dtype), np.finfo(dtype).smallest_subnormal))
    assert (np.abs(ours.astype(np.longdouble) - exact) / ulp).max() <= 2
    # Whatever its sign and payload are: the exponent is added to the bits.
    unsigned = np.uint32 if dtype == np.float32 else np.uint64
    quiet = np.array([np.nan], dtype).view(unsigned)
    nan = np.concatenate([quiet + unsigned(k) for k in range(1024)])
    nan = np.concatenate([nan, nan | unsigned(1) << unsigned(8 * dtype().itemsize - 1)]).view(dtype)
    _library.native.exponentials(nan)
    assert np.isnan(nan).all()
