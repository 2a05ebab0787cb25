"""The operators, one folder each: contract and checks here, kernels in `csrc` and in each folder."""

from unlearn_fast.ops.alpha_for_percentile import alpha_for_percentile
from unlearn_fast.ops.dampen import UndoLog, dampen_, undo_
from unlearn_fast.ops.linear_token_logprobs import linear_token_logprobs
from unlearn_fast.ops.selection_curve import selection_curve
from unlearn_fast.ops.sum_grad_squared_conv import sum_grad_squared_conv_
from unlearn_fast.ops.sum_grad_squared_embedding import sum_grad_squared_embedding_
from unlearn_fast.ops.sum_grad_squared_linear import sum_grad_squared_linear_
from unlearn_fast.ops.sum_grad_squared_scale import sum_grad_squared_scale_
from unlearn_fast.ops.token_kl import token_kl
from unlearn_fast.ops.token_logprobs import token_logprobs, token_statistics
from unlearn_fast.ops.top_fraction_mask import top_fraction_mask

__all__ = [
    "UndoLog",
    "alpha_for_percentile",
    "dampen_",
    "linear_token_logprobs",
    "selection_curve",
    "sum_grad_squared_conv_",
    "sum_grad_squared_embedding_",
    "sum_grad_squared_linear_",
    "sum_grad_squared_scale_",
    "token_kl",
    "token_logprobs",
    "token_statistics",
    "top_fraction_mask",
    "undo_",
]
