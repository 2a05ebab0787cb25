"""token_kl's Triton kernels, interpreted."""

import itertools

import pytest
import torch
from accuracy import assert_accurate, bits
from interpreted import DTYPES, randn, rounding, wide
from layouts import LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast.ops import _triton
from unlearn_fast.ops.token_kl.triton import token_kl, token_kl_backward, token_kl_backward_

IGNORED = -100
PLAIN, EVERYTHING = (0.0, 1.0, 0.0), (3.0, 0.7, 2.0)  # softcap, temperature, label_penalty


def definition(x: Tensor, teacher: Tensor, labels: Tensor, *settings: float) -> tuple[Tensor, ...]:
    """The divergence, both log-softmaxes, and the sum of the magnitudes of its terms, in float64."""
    softcap, temperature, penalty = settings
    z, w = ((softcap * torch.tanh(v / softcap) if softcap else v) / temperature for v in (x, teacher))
    w = w - penalty * torch.nn.functional.one_hot(labels.long(), x.shape[-1])
    log_p, log_q = z.log_softmax(-1), w.log_softmax(-1)
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), log_p, log_q, (q * (log_q.abs() + log_p.abs())).sum(-1)


def check(x: Tensor, teacher: Tensor, labels: Tensor, settings=PLAIN, in_place=False) -> list[Tensor]:
    kept = labels != IGNORED
    safe = labels.masked_fill(~kept, 0)
    found = token_kl(x, teacher, labels, IGNORED, *settings)
    assert all(r.shape == labels.shape and r.dtype == wide(x.dtype) for r in found)
    leaf, other = (v.double().masked_fill(~kept.unsqueeze(-1), 0) for v in (x, teacher))
    leaf.requires_grad_()
    exact, log_p, log_q, size = definition(leaf, other, safe, *settings)
    eps = torch.finfo(wide(x.dtype)).eps
    assert_accurate(found[0], exact.detach().where(kept, 0), size=size.detach().where(kept, 0) + 1e-3)
    assert not torch.stack(found)[:, ~kept].any()

    g = randn(*labels.shape, dtype=wide(x.dtype), seed=1)
    (g.double() * exact).where(kept, 0).sum().backward()
    saved = (teacher, labels, *found[1:], IGNORED, *settings)
    before = bits(teacher)
    if in_place:
        dx = x.clone() if x.is_contiguous() else x
        token_kl_backward_(g, dx, *saved)
    else:
        dx = token_kl_backward(g, x, *saved)
    assert torch.equal(bits(teacher), before)
    assert dx.shape == x.shape and dx.dtype == x.dtype and not dx[~kept].any()
    size = (log_p.detach().exp() + log_q.detach().exp()) * g.double().abs().unsqueeze(-1) / settings[1]
    assert_accurate(dx, leaf.grad, size=size, floor=16 * eps + rounding(x.dtype))
    return [*found, dx]


def draw(*shape: int, dtype=torch.float32, teacher=torch.float32, ignore: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    x, t = 3 * randn(*shape, dtype=torch.float64), 2 * randn(*shape, dtype=torch.float64, seed=9)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    if ignore and labels.numel() > 1:
        labels.view(-1)[1] = IGNORED
        for v in (x, t):
            v.view(-1, shape[-1])[1] = torch.nan  # not read
    return x.to(dtype), t.to(teacher), labels


@pytest.mark.parametrize(("dtype", "teacher"), itertools.product(DTYPES, DTYPES), ids=str)
def test_dtypes(dtype, teacher):
    check(*draw(2, 2, 1301, dtype=dtype, teacher=teacher), EVERYTHING)
    check(*draw(3, 600, dtype=dtype, teacher=teacher))


@pytest.mark.parametrize("V", [1, 2, 33, 512, 2600])
@pytest.mark.parametrize("settings", [PLAIN, (0.0, 2.0, 0.0), (5.0, 1.0, 0.0), (0.0, 1.0, 9.0), EVERYTHING], ids=str)
def test_shapes(V, settings):
    check(*draw(3, V), settings)


@pytest.mark.parametrize("processors", [1, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_split_over_programs(dtype, processors, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED_PROCESSORS", processors)
    results, again = (check(*draw(2, 2900, dtype=dtype, teacher=dtype), EVERYTHING) for _ in range(2))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 2, 1101), (2, 2, 2, 45)], ids=str)
def test_strides(layout, shape):
    x, teacher, labels = draw(*shape)
    check(x, lay_out(teacher, layout), lay_out(labels, layout), EVERYTHING)
    x = lay_out(x, layout)
    around = surroundings(x)
    check(x, teacher, labels, in_place=True)
    assert torch.equal(surroundings(x), around)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_anywhere_within_a_cache_line(dtype):
    x, teacher, labels = draw(3, 1106, dtype=dtype, ignore=False)
    labels = labels.clamp(max=1100)
    check(x[:, 3:1104], teacher[:, 3:1104], labels)
    check(x[:, 3:1104], teacher[:, 2:1103], labels, EVERYTHING, in_place=True)


def test_a_teacher_equal_to_the_student():
    x, _, labels = draw(3, 700, ignore=False)
    kl, *saved = token_kl(x, x, labels, IGNORED, 0.0, 1.0, 0.0)
    assert kl.abs().max() <= 1e-6
    assert not token_kl_backward(torch.ones(3), x, x, labels, *saved, IGNORED, 0.0, 1.0, 0.0).any()


@pytest.mark.parametrize("far", [1e3, -1e5, 1e30])
def test_a_teacher_far_from_the_student(far):
    """Softmaxes do not depend on where the logits lie; nor may the sum of their differences."""
    x, _, labels = draw(3, 1300, ignore=False)
    teacher = torch.full_like(x, far)
    teacher[:, 5] += max(1.0, abs(far) / 1e6)
    exact = definition(x.double(), teacher.double(), labels, *PLAIN)
    assert_accurate(token_kl(x, teacher, labels, IGNORED, *PLAIN)[0], exact[0], size=exact[3])


def test_masked_columns():
    """Columns at the lowest finite number, for the student alone in whole blocks, and for both."""
    x, teacher, labels = draw(2, 2600, ignore=False)
    lowest = torch.finfo(torch.float32).min
    x[:, 700:], teacher[0, 700:] = lowest, lowest
    x, teacher = x.flip(1), teacher.flip(1)
    kl = token_kl(x, teacher, labels, IGNORED, *PLAIN)[0]
    exact = definition(x.double(), teacher.double(), labels, *PLAIN)[0]
    assert_accurate(kl[:1], exact[:1])
    assert kl[1] >= 1e38  # no less than nearly infinite


def test_hostile_values():
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[0, 1, -inf], [0, 1, -inf], [0, 1, 2], [nan, 0, 0], [0, 0, 0], [inf, 0, 0], [-inf] * 3])
    teacher = torch.tensor([[0, 1, -inf], [0, 1, 2], [0, 1, -inf], [0, 0, 0], [nan, 0, 0], [0, 0, 0], [0, 0, 0]])
    labels = torch.zeros(7, dtype=torch.long)
    kl, *saved = token_kl(x, teacher, labels, IGNORED, 0.0, 1.0, 0.0)
    assert kl[0] == 0 and kl[1] == inf and kl[2].isfinite() and kl[3:].isnan().all()
    dx = token_kl_backward(torch.ones(7), x, teacher, labels, *saved, IGNORED, 0.0, 1.0, 0.0)
    assert dx[:3].isfinite().all() and not dx[0].any() and dx[3:].isnan().all()


@pytest.mark.parametrize("wrong", [-1, 700, 2**40])
@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING], ids=str)
def test_a_label_out_of_range_gives_nan_to_its_row_alone(wrong, settings):
    x, teacher, labels = draw(3, 700, ignore=False)
    right = token_kl(x, teacher, labels, IGNORED, *settings)
    labels[1] = wrong
    kl, *saved = token_kl(x, teacher, labels, IGNORED, *settings)
    assert kl[1].isnan() and torch.equal(kl[::2], right[0][::2])
    dx = token_kl_backward(torch.ones(3), x, teacher, labels, *saved, IGNORED, *settings)
    assert dx[1].isnan().all() and dx[::2].isfinite().all()


def test_every_row_is_ignored():
    x, labels = torch.full((2, 3, 700), torch.nan), torch.full((2, 3), 7)
    found = token_kl(x, x, labels, 7, *EVERYTHING)
    assert not any(r.any() for r in found)
    assert not token_kl_backward(found[0], x, x, labels, *found[1:], 7, *EVERYTHING).any()


def test_narrow_labels_one_row_and_no_rows():
    x, teacher, labels = draw(3, 200)
    check(x, teacher, labels.int(), EVERYTHING)
    check(*draw(5))
    x, labels = torch.empty(2, 0, 5), torch.empty(2, 0, dtype=torch.long)
    found = token_kl(x, x, labels, IGNORED, *PLAIN)
    assert all(r.shape == (2, 0) for r in found)
    assert token_kl_backward(found[0], x, x, labels, *found[1:], IGNORED, *PLAIN).shape == x.shape
