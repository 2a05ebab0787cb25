"""The operators, one folder each: contract and checks here, kernels in `csrc` and in each folder."""

from unlearn_fast.ops.dampen import dampen_
from unlearn_fast.ops.linear_token_logprobs import linear_token_logprobs
from unlearn_fast.ops.sum_grad_squared_conv import sum_grad_squared_conv_
from unlearn_fast.ops.sum_grad_squared_embedding import sum_grad_squared_embedding_
from unlearn_fast.ops.sum_grad_squared_linear import sum_grad_squared_linear_
from unlearn_fast.ops.sum_grad_squared_scale import sum_grad_squared_scale_
from unlearn_fast.ops.token_kl import token_kl
from unlearn_fast.ops.token_logprobs import token_logprobs, token_statistics

__all__ = [
    "dampen_",
    "linear_token_logprobs",
    "sum_grad_squared_conv_",
    "sum_grad_squared_embedding_",
    "sum_grad_squared_linear_",
    "sum_grad_squared_scale_",
    "token_kl",
    "token_logprobs",
    "token_statistics",
]
