"""Token log-probabilities, from logits and from hidden states."""

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,  # kept for the signature: the reference never overwrites the logits
) -> Tensor:
    """log_softmax(logits)[..., label] in float32 (float64 for float64 logits), 0 where the label is ignored."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ignored = labels == ignore_index
    safe = labels.masked_fill(ignored, 0).long()
    # Ignored rows are replaced before the softmax: a NaN there must reach neither the value nor the gradient.
    rows = logits.to(dtype).masked_fill(ignored.unsqueeze(-1), 0)
    logp = rows.log_softmax(-1).gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    return logp.masked_fill(ignored, 0)


def linear_token_logprobs(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    chunk_bytes: int = 64 << 20,  # kept for the signature: the reference materialises all logits
) -> Tensor:
    """token_logprobs(hidden @ weight.T + bias, labels)."""
    return token_logprobs(torch.nn.functional.linear(hidden, weight, bias), labels, ignore_index=ignore_index)
