"""The divergences of FLAT against the published formulas, written out, and their gradients as tokens become certain."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from unlearn_fast.losses import flat_forget_loss, flat_loss
from unlearn_fast.losses.divergences import OFFICIAL, PAPER, REVERSED

every_form = pytest.mark.parametrize(
    ("divergence", "formulation"), list(itertools.product(PAPER, ("paper", "official")))
)
pytestmark = pytest.mark.filterwarnings("ignore:formulation='official':UserWarning")


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


LOSSES = {  # loss(e, f), dL/de, dL/df
    "kl": (
        lambda e, f: -e + math.exp(f - 1),
        lambda e: -1,
        lambda f: math.exp(f - 1),
    ),
    "jeffrey": (
        lambda e, f: -e + f + f**2 / 4 + f**3 / 16,
        lambda e: -1,
        lambda f: 1 + f / 2 + 3 * f**2 / 16,
    ),
    "pearson": (
        lambda e, f: -e + f + f**2 / 4,
        lambda e: -1,
        lambda f: 1 + f / 2,
    ),
    "jensen_shannon": (
        lambda e, f: math.log(1 + math.exp(-e)) + math.log(1 + math.exp(f)) - 2 * math.log(2),
        lambda e: -1 / (1 + math.exp(e)),
        lambda f: 1 / (1 + math.exp(-f)),
    ),
    "total_variation": (
        lambda e, f: -math.tanh(e) / 2 + math.tanh(f) / 2,
        lambda e: -(1 - math.tanh(e) ** 2) / 2,
        lambda f: (1 - math.tanh(f) ** 2) / 2,
    ),
    "reverse_kl": (
        lambda e, f: math.exp(-e) - 1 + f,
        lambda e: -math.exp(-e),
        lambda f: 1,
    ),
    "squared_hellinger": (
        lambda e, f: math.exp(-e) + math.exp(f) - 2,
        lambda e: -math.exp(-e),
        lambda f: math.exp(f),
    ),
    "neyman": (
        lambda e, f: math.exp(-e) + 1 - 2 * math.exp(-f / 2),
        lambda e: -math.exp(-e),
        lambda f: math.exp(-f / 2),
    ),
}
RELEASED_LOSSES = LOSSES | {
    "reverse_kl": (
        lambda e, f: math.exp(e) - 1 - f,
        math.exp,
        lambda f: -1,
    ),
    "squared_hellinger": (
        lambda e, f: math.exp(e) + math.exp(-f) - 2,
        math.exp,
        lambda f: -math.exp(-f),
    ),
    "neyman": (
        lambda e, f: math.exp(e) + 1 - 2 * math.sqrt(1 - f),
        math.exp,
        lambda f: 1 / math.sqrt(1 - f),
    ),
}


@every_form
def test_table_values_and_derivatives(divergence, formulation):
    terms = (PAPER if formulation == "paper" else OFFICIAL)[divergence]
    loss, d_template, d_forget = (LOSSES if formulation == "paper" else RELEASED_LOSSES)[divergence]
    for e, f in itertools.product((0.0, 1e-9, 0.25, 0.5, 0.99, 1.0), (0.0, 1e-9, 0.3, 0.75, 0.99)):
        x, y = (leaf(torch.tensor(p, dtype=torch.float64)) for p in (e, f))
        value = terms.template(x) - terms.forget(y)
        gradients = [g.item() for g in torch.autograd.grad(value, (x, y))]
        assert value.item() == pytest.approx(loss(e, f), rel=1e-14, abs=1e-15)
        assert gradients == pytest.approx([d_template(e), d_forget(f)], rel=1e-14)


@pytest.mark.parametrize("divergence", PAPER)
def test_signs(divergence):
    p = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    for table in (PAPER, OFFICIAL):
        e, f = leaf(p), leaf(p)
        (de,) = torch.autograd.grad(table[divergence].template(e).sum(), e)
        (df,) = torch.autograd.grad(-table[divergence].forget(f).sum(), f)
        official_reversal = REVERSED.get(divergence, "") if table is OFFICIAL else ""
        assert (de > 0).all() if "template probability down" in official_reversal else (de < 0).all()
        assert (df < 0).all() if "forget probability up" in official_reversal else (df > 0).all()


@pytest.mark.parametrize("divergence", [name for name in PAPER if name != "kl"])
def test_small_probabilities_survive_in_float32(divergence):
    """Long answers have tiny probabilities: 1 + p would round them away."""
    p = torch.tensor(1e-12)
    for table in (PAPER, OFFICIAL):
        template = table[divergence].template(p).item() / table[divergence].template(p.double()).item()
        assert template == pytest.approx(1, rel=1e-6)
    forget = PAPER[divergence].forget(p).item() / PAPER[divergence].forget(p.double()).item()
    assert forget == pytest.approx(1, rel=1e-6)


@every_form
@pytest.mark.parametrize("gap", [-300, -20, 0, 8, 17, 40, 80, 300], ids=str)
def test_confident_tokens(divergence, formulation, gap):
    """float32 keeps the gradient of every column as p -> 1, where even float64 autograd of a softmax loses the label's.

    Every token has the same p = 1 / (1 + 4 exp(-gap)), so that e = f = p, and the gradient can be written down.
    """
    labels = torch.tensor([[0, 2, 1, 3]])
    logits = torch.zeros(1, 4, 5)
    logits[0, range(3), labels[0, 1:]] = gap
    rest = 4 * math.exp(-gap) / (1 + 4 * math.exp(-gap))  # 1 - p
    p = 1 / (1 + 4 * math.exp(-gap))
    onehot_minus_p = torch.full((1, 4, 5), -rest / 4, dtype=torch.float64)
    onehot_minus_p[0, range(3), labels[0, 1:]] = rest
    onehot_minus_p[:, 3] = 0
    sides = leaf(logits), leaf(logits)
    loss = flat_loss(sides[0], labels, sides[1], labels, divergence=divergence, formulation=formulation)
    grads = torch.autograd.grad(loss, sides)
    assert all(g.isfinite().all() for g in grads)
    value, d_template, d_forget = (LOSSES if formulation == "paper" else RELEASED_LOSSES)[divergence]
    if gap > 8 and (divergence, formulation) == ("neyman", "official"):
        return  # 1 - f has few digits left, or none: see the next test
    assert loss.item() == pytest.approx(value(p, p), rel=1e-6, abs=3e-7)
    expected = [slope(p) * p / 3 * onehot_minus_p for slope in (d_template, d_forget)]
    torch.testing.assert_close([g.double() for g in grads], expected, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_released_neyman_at_certainty(dtype):
    """1/sqrt(1 - f) grows without bound, yet the gradient in the logits, of order sqrt(1 - f), must go to 0."""
    labels = torch.tensor([[0, 1]])
    largest = []
    for gap in (4, 8, 12, 14, 16, 18, 30, 36, 40, 800):
        logits = torch.zeros(1, 2, 3, dtype=dtype)
        logits[0, 0, 1] = gap
        logits.requires_grad_()
        loss = flat_forget_loss(logits, labels, divergence="neyman", formulation="official")
        (grad,) = torch.autograd.grad(loss, logits)
        largest.append(grad.abs().max().item())
        p = 1 / (1 + 2 * math.exp(-gap))
        root = math.sqrt(2 * math.exp(-gap) * p)  # sqrt(1 - p)
        lost = math.sqrt(torch.finfo(dtype).eps)  # what 1 - f cannot resolve
        assert loss.item() == pytest.approx(2 - 2 * root, abs=2 * lost)
        assert largest[-1] == pytest.approx(p * root, abs=lost)
    assert largest == sorted(largest, reverse=True) and largest[-1] == 0
