"""Unlearning losses: plain, differentiable torch over the operators."""

from unlearn_fast.losses.divergences import Divergence
from unlearn_fast.losses.drop_ins import cross_entropy, selective_log_softmax
from unlearn_fast.losses.flat import FLATLoss, flat_forget_loss, flat_loss, flat_template_loss, linear_flat_loss

__all__ = [
    "Divergence",
    "FLATLoss",
    "cross_entropy",
    "flat_forget_loss",
    "flat_loss",
    "flat_template_loss",
    "linear_flat_loss",
    "selective_log_softmax",
]
