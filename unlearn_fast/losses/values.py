"""Every loss once: the value of each sequence, as a function of the log-probabilities of its tokens.

logp is [B, T], 0 where `labelled` [B, T] is false; the result is [B], 0 for a sequence without a labelled token. The
losses that compare with a reference model take log-probabilities of whole sequences, [B].
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def per_token(x: Tensor, labelled: Tensor) -> Tensor:
    """The mean of x over the labelled tokens."""
    return x.masked_fill(~labelled, 0).sum(1) / labelled.sum(1).clamp(min=1)


def gradient_ascent(logp: Tensor, labelled: Tensor) -> Tensor:
    return per_token(logp, labelled)


def grad_diff(
    forget: Tensor, forget_labelled: Tensor, retain: Tensor, retain_labelled: Tensor, *, retain_weight: float
) -> Tensor:
    return per_token(forget, forget_labelled) - retain_weight * per_token(retain, retain_labelled)


def npo(logp: Tensor, labelled: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    return _preference(reference - logp.sum(1), beta).masked_fill(~labelled.any(1), 0)


def simnpo(logp: Tensor, labelled: Tensor, *, beta: float, delta: float) -> Tensor:
    return _preference(-per_token(logp, labelled) - delta, beta).masked_fill(~labelled.any(1), 0)


def dpo(
    preferred: Tensor,
    preferred_labelled: Tensor,
    forget: Tensor,
    forget_labelled: Tensor,
    preferred_reference: Tensor,
    forget_reference: Tensor,
    *,
    beta: float,
) -> Tensor:
    ratio = (preferred.sum(1) - preferred_reference) - (forget.sum(1) - forget_reference)
    return _preference(ratio, beta).masked_fill(~(preferred_labelled.any(1) & forget_labelled.any(1)), 0)


def _preference(advantage: Tensor, beta: float) -> Tensor:
    """Bounded below by 0, which it approaches as the advantage grows."""
    return -2 / beta * logsigmoid(beta * advantage)


def wga(logp: Tensor, labelled: Tensor, *, beta: float) -> Tensor:
    return per_token((beta * logp.detach()).exp() * logp, labelled)


def satimp(logp: Tensor, labelled: Tensor, *, beta1: float, beta2: float) -> Tensor:
    constant = logp.detach()
    rest = -constant.expm1()  # 1 - p keeps its digits as p tends to 1
    return per_token((beta1 * constant).exp() * rest**beta2 * logp, labelled)


def ceu(logp: Tensor, labelled: Tensor) -> Tensor:
    return per_token(-_log_of_rest(logp.masked_fill(~labelled, -1)), labelled)


def _log_of_rest(logp: Tensor) -> Tensor:
    """log(1 - p), with the derivative -p / (1 - p): each in the form that keeps its digits, below and above p = 1/2.

    Where log p has rounded to 0 it is the logarithm of the smallest number, without a derivative.
    """
    half = -math.log(2)
    small, large = logp.clamp(max=half), logp.clamp(half, -torch.finfo(logp.dtype).tiny)
    return torch.where(logp < half, (-small.exp()).log1p(), (-large.expm1()).log())
