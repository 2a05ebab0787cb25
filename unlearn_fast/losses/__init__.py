"""Unlearning losses: plain, differentiable torch over the operators, from logits and from hidden states."""

from unlearn_fast.losses.cross_entropy import (
    linear_cross_entropy,
)
from unlearn_fast.losses.divergences import (
    Divergence,
)
from unlearn_fast.losses.drop_ins import cross_entropy, selective_log_softmax
from unlearn_fast.losses.flat import (
    FLATLoss,
    flat_forget_loss,
    flat_loss,
    flat_template_loss,
    linear_flat_loss,
)
from unlearn_fast.losses.forms import (
    LinearOptions,
    LogitsOptions,
)
from unlearn_fast.losses.sequence import (
    ceu_loss,
    dpo_loss,
    grad_diff_loss,
    gradient_ascent_loss,
    linear_ceu_loss,
    linear_dpo_loss,
    linear_grad_diff_loss,
    linear_gradient_ascent_loss,
    linear_npo_loss,
    linear_satimp_loss,
    linear_sequence_logprobs,
    linear_simnpo_loss,
    linear_wga_loss,
    npo_loss,
    satimp_loss,
    sequence_logprobs,
    simnpo_loss,
    wga_loss,
)
from unlearn_fast.losses.teacher import (
    kl_retain_loss,
    linear_kl_retain_loss,
    linear_undial_loss,
    undial_loss,
)
from unlearn_fast.losses.vocabulary import (
    VocabularyShard,
)

__all__ = [
    "Divergence",
    "FLATLoss",
    "LinearOptions",
    "LogitsOptions",
    "VocabularyShard",
    "ceu_loss",
    "cross_entropy",
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
    "linear_undial_loss",
    "linear_wga_loss",
    "npo_loss",
    "satimp_loss",
    "selective_log_softmax",
    "sequence_logprobs",
    "simnpo_loss",
    "undial_loss",
    "wga_loss",
]
