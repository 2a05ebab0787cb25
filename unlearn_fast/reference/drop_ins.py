"""The functions that the drop-ins stand in for."""

import torch
from torch import Tensor


def selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K]
) -> Tensor:
    """log_softmax(logits, -1) at the columns `index`, in the logits' dtype."""
    columns = index if index.dim() == logits.dim() else index.unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, columns.long()).view(index.shape)


def cross_entropy(
    logits: Tensor,  # [N, C], [C] or [N, C, d1, ...]
    target: Tensor,  # [N], [] or [N, d1, ...]
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch's own."""
    return torch.nn.functional.cross_entropy(
        logits, target.long(), ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
