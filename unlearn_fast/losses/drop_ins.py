"""Functions that training code already calls, on the same pass over the logits, with their contracts."""

import torch
from torch import Tensor

from unlearn_fast._library import warn_if_slow
from unlearn_fast.ops import _checks
from unlearn_fast.ops.token_logprobs import token_logprobs, token_statistics

NOTHING_IGNORED = -(2**63)  # no position in a vocabulary, and no label that a caller marks rows with


def selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K]
) -> Tensor:  # as index
    """`log_softmax(logits, -1)` at the given columns: TRL's function of this name.

    Args:
        logits: [..., V] in float32, float64, bfloat16 or float16.
        index: int64 or int32 columns in [0, V): one a row, [...], or K a row, [..., K].

    Returns:
        Shaped like `index`, in the logits' dtype; computed in float32 (float64 for float64) and rounded once.
        Differentiable once.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit.
        RuntimeError: a column outside [0, V) (on the CPU).
    """
    if index.dim() != logits.dim():
        return token_logprobs(logits, index, ignore_index=NOTHING_IGNORED).to(logits.dtype)
    _checks.floating("logits", logits)
    if index.shape[-1] == 0:
        return logits[..., :0]
    # The columns are gathered, and the normaliser comes from one pass for the first of them.
    first, scaling = index[..., 0], (NOTHING_IGNORED, 0.0, 1.0, False)
    _checks.labels_of_rows("index[..., 0]", first, "logits", logits)
    warn_if_slow(logits.device.type)
    _, row_max, log_sum, *_ = torch.ops.unlearn_fast.token_logprobs(logits, first, *scaling)
    chosen = logits.gather(-1, index.long()).to(log_sum.dtype)
    return (chosen - row_max.unsqueeze(-1) - log_sum.unsqueeze(-1)).to(logits.dtype)


def cross_entropy(
    logits: Tensor,  # [N, C], [C] or [N, C, d1, ...]
    target: Tensor,  # [N], [] or [N, d1, ...]
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` of class indices, without class weights.

    loss = -(1 - label_smoothing) log p_target - label_smoothing mean_j log p_j for each target, 0 for ignored ones;
    "mean" divides their sum by the number of the others, and is NaN where all are ignored.

    Args:
        logits: float32, float64, bfloat16 or float16. [N, C, d1, ...] is copied where C is not innermost in memory.
        target: int64 or int32, each in [0, C) or `ignore_index`.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].

    Returns:
        In the logits' dtype, computed in float32 (float64 for float64) and rounded once; shaped like `target` for
        "none", else []. Differentiable once.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit.
        RuntimeError: a target outside [0, C) (on the CPU).
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}: it must be 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be in [0, 1]")
    if logits.dim() == 0:
        raise ValueError("logits has shape []: it must be [N, C], [C] or [N, C, d1, ...]")
    rows = logits.movedim(1, -1) if logits.dim() > 1 else logits
    if label_smoothing == 0:
        losses = -token_logprobs(rows, target, ignore_index=ignore_index)
    else:
        s = token_statistics(rows, target, ignore_index=ignore_index)
        losses = label_smoothing * (s.lse - s.mean_logit) - (1 - label_smoothing) * s.logp
    if reduction == "none":
        return losses.to(logits.dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / (target != ignore_index).sum()
    return total.to(logits.dtype)
