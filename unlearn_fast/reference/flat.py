"""FLAT: the published formula and the released one, sequence by sequence."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

# name -> (term of the template probability e, term of the forget probability f); the loss is their sum
PAPER = {
    "kl": (lambda e: -e, lambda f: torch.exp(f - 1)),
    "jeffrey": (lambda e: -e, lambda f: f + f**2 / 4 + f**3 / 16),
    "pearson": (lambda e: -e, lambda f: f + f**2 / 4),
    "jensen_shannon": (lambda e: softplus(-e) - math.log(2), lambda f: softplus(f) - math.log(2)),
    "total_variation": (lambda e: -torch.tanh(e) / 2, lambda f: torch.tanh(f) / 2),
    "reverse_kl": (lambda e: torch.expm1(-e), lambda f: f),
    "squared_hellinger": (lambda e: torch.expm1(-e), lambda f: torch.expm1(f)),
    "neyman": (lambda e: torch.expm1(-e), lambda f: 2 - 2 * torch.exp(-f / 2)),
}
OFFICIAL = PAPER | {
    "reverse_kl": (lambda e: torch.expm1(e), lambda f: -f),
    "squared_hellinger": (lambda e: torch.expm1(e), lambda f: torch.expm1(-f)),
    "neyman": (lambda e: torch.expm1(e), lambda f: 2 - 2 * torch.sqrt(1 - f)),
}


def flat_loss(
    template_logits: Tensor,  # [B, T, V]
    template_labels: Tensor,  # [B, T]
    forget_logits: Tensor,  # [B, T', V]
    forget_labels: Tensor,  # [B, T']
    *,
    divergence: str = "total_variation",
    formulation: str = "paper",
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,  # kept for the signature: the reference never overwrites the logits
) -> Tensor:  # []
    """The sum of the two sides."""
    options = divergence, formulation, ignore_index, softcap, temperature
    return _side(0, template_logits, template_labels, *options) + _side(1, forget_logits, forget_labels, *options)


def flat_template_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    divergence: str = "total_variation",
    formulation: str = "paper",
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:  # []
    """The template term of the divergence, of the mean probability of the labelled tokens."""
    return _side(0, logits, labels, divergence, formulation, ignore_index, softcap, temperature)


def flat_forget_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    divergence: str = "total_variation",
    formulation: str = "paper",
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:  # []
    """The forget term of the divergence, of the mean probability of the labelled tokens."""
    return _side(1, logits, labels, divergence, formulation, ignore_index, softcap, temperature)


def linear_flat_loss(
    template_hidden: Tensor,  # [B, T, H]
    template_labels: Tensor,  # [B, T]
    forget_hidden: Tensor,  # [B, T', H]
    forget_labels: Tensor,  # [B, T']
    weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,  # [V]
    divergence: str = "total_variation",
    formulation: str = "paper",
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,  # kept for the signature, as the next ones: the reference materialises all logits
    weight_grad_dtype: torch.dtype | None = None,
    shard: Any = None,
) -> Tensor:  # []
    """flat_loss of hidden @ weight.T + bias."""
    return flat_loss(
        linear(template_hidden, weight, bias),
        template_labels,
        linear(forget_hidden, weight, bias),
        forget_labels,
        divergence=divergence,
        formulation=formulation,
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
    )


def _side(
    side: int,
    logits: Tensor,
    labels: Tensor,
    divergence: str,
    formulation: str,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """paper: mean over sequences of term(mean p); official: term(sum p / (B * (T - 1))); 0 where there is no p."""
    term = {"paper": PAPER, "official": OFFICIAL}[formulation][divergence][side]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    zero = logits[:0].sum(dtype=dtype)  # a zero that carries a gradient, whatever the logits hold
    answers = [
        _probabilities(z, y, ignore_index, softcap, temperature)
        for z, y in zip(logits[:, :-1].to(dtype), labels[:, 1:].long(), strict=True)
    ]
    if formulation == "paper":
        return sum((term(p.mean()) for p in answers if len(p)), zero) / max(len(answers), 1)
    p = torch.cat([zero.new_zeros(0), *answers])
    return zero + term(p.sum() / labels[:, 1:].numel()) if len(p) else zero


def _probabilities(
    logits: Tensor,  # [T, V]
    labels: Tensor,  # [T]
    ignore_index: int,
    softcap: float | None,
    temperature: float,
) -> Tensor:  # [number of labelled tokens]
    """softmax(logits)[t, labels[t]] of the labelled tokens."""
    labelled = labels != ignore_index
    z = logits[labelled]
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    return z.softmax(-1).gather(-1, labels[labelled].unsqueeze(-1)).squeeze(-1)
