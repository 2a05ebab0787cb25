"""The specification: every operator in a few lines of plain torch, with the same name and signature.

Slow, differentiable, any device, any floating dtype. The kernels are tested against these functions in float64.
"""

from unlearn_fast.reference.dampen import dampen_
from unlearn_fast.reference.drop_ins import cross_entropy, selective_log_softmax
from unlearn_fast.reference.flat import flat_forget_loss, flat_loss, flat_template_loss, linear_flat_loss
from unlearn_fast.reference.linear_sequences import (
    linear_ceu_loss,
    linear_dpo_loss,
    linear_grad_diff_loss,
    linear_gradient_ascent_loss,
    linear_kl_retain_loss,
    linear_npo_loss,
    linear_satimp_loss,
    linear_sequence_logprobs,
    linear_simnpo_loss,
    linear_undial_loss,
    linear_wga_loss,
)
from unlearn_fast.reference.logprobs import linear_token_logprobs, token_kl, token_logprobs, token_statistics
from unlearn_fast.reference.selection import alpha_for_percentile, selection_curve, top_fraction_mask
from unlearn_fast.reference.sequences import (
    ceu_loss,
    dpo_loss,
    grad_diff_loss,
    gradient_ascent_loss,
    kl_retain_loss,
    linear_cross_entropy,
    npo_loss,
    satimp_loss,
    sequence_logprobs,
    simnpo_loss,
    undial_loss,
    wga_loss,
)
from unlearn_fast.reference.squares import (
    sum_grad_squared_conv_,
    sum_grad_squared_embedding_,
    sum_grad_squared_linear_,
    sum_grad_squared_scale_,
)

__all__ = [
    "alpha_for_percentile",
    "ceu_loss",
    "cross_entropy",
    "dampen_",
    "dpo_loss",
    "flat_forget_loss",
    "flat_loss",
    "flat_template_loss",
    "grad_diff_loss",
    "gradient_ascent_loss",
    "kl_retain_loss",
    "linear_ceu_loss",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_flat_loss",
    "linear_grad_diff_loss",
    "linear_gradient_ascent_loss",
    "linear_kl_retain_loss",
    "linear_npo_loss",
    "linear_satimp_loss",
    "linear_sequence_logprobs",
    "linear_simnpo_loss",
    "linear_token_logprobs",
    "linear_undial_loss",
    "linear_wga_loss",
    "npo_loss",
    "satimp_loss",
    "selection_curve",
    "selective_log_softmax",
    "sequence_logprobs",
    "simnpo_loss",
    "sum_grad_squared_conv_",
    "sum_grad_squared_embedding_",
    "sum_grad_squared_linear_",
    "sum_grad_squared_scale_",
    "token_kl",
    "token_logprobs",
    "token_statistics",
    "top_fraction_mask",
    "undial_loss",
    "wga_loss",
]
