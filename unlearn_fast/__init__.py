"""Compiled kernels for machine unlearning in PyTorch."""

from unlearn_fast._report import DampenCounts, DampenReport, TokenStatistics
from unlearn_fast.fisher import (
    Importance,
    WeightedLosses,
    causal_lm_losses,
    classification_losses,
    coverage,
    diagonal_fisher,
    output_norm_losses,
)
from unlearn_fast.losses import (
    FLATLoss,
    cross_entropy,
    flat_forget_loss,
    flat_loss,
    flat_template_loss,
    linear_flat_loss,
    selective_log_softmax,
)
from unlearn_fast.ops import (
    dampen_,
    linear_token_logprobs,
    sum_grad_squared_conv_,
    sum_grad_squared_embedding_,
    sum_grad_squared_linear_,
    sum_grad_squared_scale_,
    token_kl,
    token_logprobs,
    token_statistics,
)
from unlearn_fast.ssd import ssd_

__version__ = "0.1.0"

__all__ = [
    "DampenCounts",
    "DampenReport",
    "FLATLoss",
    "Importance",
    "TokenStatistics",
    "WeightedLosses",
    "causal_lm_losses",
    "classification_losses",
    "coverage",
    "cross_entropy",
    "dampen_",
    "diagonal_fisher",
    "flat_forget_loss",
    "flat_loss",
    "flat_template_loss",
    "linear_flat_loss",
    "linear_token_logprobs",
    "output_norm_losses",
    "selective_log_softmax",
    "ssd_",
    "sum_grad_squared_conv_",
    "sum_grad_squared_embedding_",
    "sum_grad_squared_linear_",
    "sum_grad_squared_scale_",
    "token_kl",
    "token_logprobs",
    "token_statistics",
]
