"""Compiled kernels for machine unlearning in PyTorch."""

from unlearn_fast._report import DampenCounts, DampenReport
from unlearn_fast.ops import dampen_, linear_token_logprobs, sum_grad_squared_linear_, token_logprobs

__version__ = "0.1.0"
