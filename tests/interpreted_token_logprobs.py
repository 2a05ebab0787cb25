"""token_logprobs' Triton kernels, interpreted."""

import itertools

import pytest
import torch
from accuracy import assert_accurate, bits
from interpreted import DTYPES, randn, rounding, wide
from layouts import LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast.ops import _triton
from unlearn_fast.ops.token_logprobs.triton import (
    token_logprobs,
    token_logprobs_backward,
    token_logprobs_backward_,
)

IGNORED = -100
PLAIN, EVERYTHING = (0.0, 1.0), (3.0, 0.7)  # softcap, temperature


def definition(x: Tensor, labels: Tensor, softcap: float, temperature: float) -> tuple[Tensor, ...]:
    """logp, lse, entropy, mean_logit, max_logit and hit in float64; the labels must be in range."""
    z = (softcap * torch.tanh(x / softcap) if softcap else x) / temperature
    own = z.gather(-1, labels.long().unsqueeze(-1))
    others = (z - own).scatter(-1, labels.long().unsqueeze(-1), -torch.inf).logsumexp(-1)
    logp = -torch.logaddexp(others, torch.zeros_like(others))  # to its last digit as p -> 1
    log_p = z.log_softmax(-1).scatter(-1, labels.long().unsqueeze(-1), logp.unsqueeze(-1))
    hit = own.squeeze(-1) == z.amax(-1)
    return logp, z.logsumexp(-1), -(log_p.exp() * log_p).sum(-1), z.mean(-1), z.amax(-1), hit.double()


def terms(
    x: Tensor, labels: Tensor, exact: tuple[Tensor, ...], grads: list[Tensor | None], softcap: float, temperature: float
) -> Tensor:
    """The sum of the magnitudes of what the gradient adds up, which may cancel."""
    z = (softcap * torch.tanh(x / softcap) if softcap else x) / temperature
    logp, _, entropy = (e.detach() for e in exact[:3])
    log_p = z.log_softmax(-1)
    g, l, h, m = (torch.zeros_like(logp) if g is None else g.double().abs() for g in grads)  # noqa: E741
    size = log_p.exp() * ((g + l + h * entropy).unsqueeze(-1) + h.unsqueeze(-1) * log_p.abs()) + (
        m / x.shape[-1]
    ).unsqueeze(-1)
    own = labels.long().unsqueeze(-1)
    rest = (size - log_p.exp() * g.unsqueeze(-1)).gather(-1, own)
    return size.scatter(-1, own, rest - (g * logp.expm1()).unsqueeze(-1)) / temperature


def check(x: Tensor, labels: Tensor, settings=PLAIN, given=(True, True, True), in_place=False) -> list[Tensor]:
    """All results and the gradient, against the definition; returns them. given: which cotangents beside logp's."""
    kept = labels != IGNORED
    safe = labels.masked_fill(~kept, 0)
    statistics = any(given)
    found = token_logprobs(x, labels, IGNORED, *settings, statistics)
    assert all(r.dtype == wide(x.dtype) for r in found)
    assert [r.shape for r in found] == [labels.shape] * 3 + [labels.shape if statistics else (0,)] * 3
    leaf = x.double().masked_fill(~kept.unsqueeze(-1), 0).requires_grad_()
    exact = definition(leaf, safe, *settings)
    z = (settings[0] or 1) * leaf.detach().abs().amax(-1) / settings[1]
    logp, row_max, log_sum, entropy, mean, hit = found
    pairs = [(logp, exact[0], 0), (row_max + log_sum, exact[1], z), (row_max, exact[4], 0)]
    if statistics:
        pairs += [(entropy, exact[2], 1), (mean, exact[3], z)]
        assert torch.equal(hit.double(), exact[5].where(kept, 0))
    for result, wanted, size in pairs:
        wanted = wanted.detach().where(kept, 0)
        assert_accurate(result, wanted, size=wanted.abs() + size)

    grads = [randn(*labels.shape, dtype=wide(x.dtype), seed=n) for n in range(4)]
    used = [grads[0], *(g if use else None for g, use in zip(grads[1:], given, strict=True))]
    sum((g.double() * e).where(kept, 0).sum() for g, e in zip(used, exact[:4], strict=True) if g is not None).backward()
    saved = (labels, logp, row_max, log_sum, entropy, IGNORED, *settings)
    if in_place:
        dx = x.clone() if x.is_contiguous() else x
        token_logprobs_backward_(*used, dx, *saved)
    else:
        dx = token_logprobs_backward(*used, x, *saved)
    assert dx.shape == x.shape and dx.dtype == x.dtype
    assert not dx[~kept].any()
    size = terms(leaf.detach(), safe, exact, used, *settings)
    assert_accurate(dx, leaf.grad, size=size, floor=16 * torch.finfo(wide(x.dtype)).eps + rounding(x.dtype))
    return [*found, dx]


def draw(*shape: int, dtype: torch.dtype = torch.float32, ignore: bool = True) -> tuple[Tensor, Tensor]:
    x = 3 * randn(*shape, dtype=torch.float64)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    if ignore and labels.numel() > 1:
        labels.view(-1)[1] = IGNORED
        x.view(-1, shape[-1])[1] = torch.nan  # not read
    return x.to(dtype), labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 33, 512, 1301, 2600])
def test_shapes(dtype, V):
    check(*draw(3, V, dtype=dtype), given=(False,) * 3)
    check(*draw(2, 2, V, dtype=dtype), EVERYTHING)


@pytest.mark.parametrize("given", itertools.product((False, True), repeat=3))
def test_cotangents(given):
    check(*draw(3, 700), given=given)
    check(*draw(3, 90), EVERYTHING, given=given, in_place=True)


@pytest.mark.parametrize("processors", [1, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_split_over_programs(dtype, processors, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED_PROCESSORS", processors)
    x, labels = draw(2, 2900, dtype=dtype)
    results, again = check(x, labels, EVERYTHING), check(x, labels, EVERYTHING)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, again, strict=True))
    check(x[:1], torch.tensor([2899]), in_place=True)
    check(x[:1], torch.tensor([0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 67), (2, 3, 1101), (2, 2, 2, 45)], ids=str)
def test_strides(layout, shape):
    x, labels = draw(*shape)
    x, labels = lay_out(x, layout), lay_out(labels, layout)
    check(x, labels)
    around = surroundings(x)
    check(x, labels, in_place=True)
    assert torch.equal(surroundings(x), around)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1101, 1104])
def test_rows_anywhere_within_a_cache_line(dtype, V):
    """Rows that begin at every place, and whose gradient has another."""
    x, labels = draw(3, V + 5, dtype=dtype, ignore=False)
    check(x[:, 3 : V + 3], labels.clamp(max=V - 1), in_place=dtype.itemsize < 4)
    x, labels = draw(2, 2, V, dtype=dtype, ignore=False)
    check(x[:, :-1], labels[:, :-1], EVERYTHING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [5.0, 20.0, 80.0])
def test_confident_rows_keep_their_precision(dtype, lead):
    x, labels = draw(2, 600, dtype=torch.float64, ignore=False)
    x.scatter_(1, labels.unsqueeze(1), x.amax(1, keepdim=True) + lead)
    x = x.to(dtype)
    logp, row_max, log_sum, entropy, *_ = token_logprobs(x, labels, IGNORED, 0.0, 1.0, True)
    wide_x = x.double()
    exact = definition(wide_x, labels, 0.0, 1.0)
    # In float64 the definition's own differences are rounded.
    assert_accurate(logp, exact[0], floor=max(4, lead if dtype == torch.float64 else 0) * torch.finfo(logp.dtype).eps)
    assert_accurate(entropy, exact[2], floor=32 * torch.finfo(logp.dtype).eps)
    g = torch.full_like(logp, -1e6)
    dx = token_logprobs_backward(g, None, None, None, x, labels, logp, row_max, log_sum, entropy, IGNORED, 0.0, 1.0)
    wanted = g.double() * -exact[0].expm1()
    assert_accurate(
        dx.gather(1, labels.unsqueeze(1)).squeeze(1), wanted, floor=8 * torch.finfo(logp.dtype).eps + rounding(dtype)
    )


def test_hostile_values():
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[0, 1, -inf], [0, -inf, 1], [inf, 0, 0], [0, inf, 0], [nan, 0, 0], [-inf] * 3, [-inf, 2, -inf]])
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 1])
    logp, row_max, log_sum, entropy, mean, hit = token_logprobs(x, labels, IGNORED, 0.0, 1.0, True)
    one = -(1 + torch.tensor(1.0).exp()).log()  # of 0 beside 1
    torch.testing.assert_close(logp, torch.stack([one, *torch.tensor([-inf, nan, nan, nan, nan, 0])]), equal_nan=True)
    assert row_max.tolist()[:4] == [1, 1, inf, inf] and row_max[4].isnan() and row_max[5] == -inf
    assert entropy[:2].isfinite().all() and entropy[2:6].isnan().all() and entropy[6] == 0
    torch.testing.assert_close(mean, torch.tensor([-inf, -inf, inf, inf, nan, -inf, -inf]), equal_nan=True)
    assert hit.tolist() == [0, 0, 0, 1, 0, 1, 1]
    one = torch.ones(7)
    dx = token_logprobs_backward(one, None, one, None, x, labels, logp, row_max, log_sum, entropy, IGNORED, 0.0, 1.0)
    assert dx[0].isfinite().all() and dx[0, 2] == 0 and dx[6].tolist() == [0, 0, 0]
    assert dx[2:6].isnan().all()


def test_every_row_is_ignored():
    x = torch.full((2, 3, 700), torch.nan)
    labels = torch.full((2, 3), 7)
    found = token_logprobs(x, labels, 7, 0.0, 1.0, True)
    assert not any(r.any() for r in found)
    dx = token_logprobs_backward(*found[:1] * 4, x, labels, *found[:4], 7, 0.0, 1.0)
    assert not dx.any()


@pytest.mark.parametrize("wrong", [-1, 700, 2**40, -(2**40)])
def test_a_label_out_of_range_gives_nan_to_its_row_alone(wrong):
    x, labels = draw(3, 700, ignore=False)
    right = token_logprobs(x, labels, IGNORED, 0.0, 1.0, True)
    labels[1] = wrong
    found = token_logprobs(x, labels, IGNORED, 0.0, 1.0, True)
    assert all(r[1].isnan() for r in found[:5]) and found[5][1] == 0
    assert all(torch.equal(a[::2], b[::2]) for a, b in zip(found, right, strict=True))
    dx = token_logprobs_backward(*right[:1] * 4, x, labels, *found[:4], IGNORED, 0.0, 1.0)
    assert dx[1].isnan().all() and dx[::2].isfinite().all()


def test_narrow_labels_and_one_row():
    x, labels = draw(3, 200)
    check(x, labels.int())
    check(*draw(5))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(shape):
    x, labels = torch.empty(shape), torch.empty(shape[:-1], dtype=torch.long)
    found = token_logprobs(x, labels, IGNORED, 0.0, 1.0, True)
    assert all(r.shape == labels.shape for r in found)
    assert token_logprobs_backward(*found[:1] * 4, x, labels, *found[:4], IGNORED, 0.0, 1.0).shape == shape
