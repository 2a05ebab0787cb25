"""The specification: every operator in a few lines of plain torch, with the same name and signature.

Slow, differentiable, any device, any floating dtype. The kernels are tested against these functions in float64.
"""

from unlearn_fast.reference.dampen import dampen_
from unlearn_fast.reference.drop_ins import cross_entropy, selective_log_softmax
from unlearn_fast.reference.flat import flat_forget_loss, flat_loss, flat_template_loss, linear_flat_loss
from unlearn_fast.reference.logprobs import linear_token_logprobs, token_kl, token_logprobs, token_statistics
from unlearn_fast.reference.squares import (
    sum_grad_squared_conv_,
    sum_grad_squared_embedding_,
    sum_grad_squared_linear_,
    sum_grad_squared_scale_,
)

__all__ = [
    "cross_entropy",
    "dampen_",
    "flat_forget_loss",
    "flat_loss",
    "flat_template_loss",
    "linear_flat_loss",
    "linear_token_logprobs",
    "selective_log_softmax",
    "sum_grad_squared_conv_",
    "sum_grad_squared_embedding_",
    "sum_grad_squared_linear_",
    "sum_grad_squared_scale_",
    "token_kl",
    "token_logprobs",
    "token_statistics",
]
