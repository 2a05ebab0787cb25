"""Sums of squared per-example gradients."""

from torch import Tensor


def sum_grad_squared_linear_(
    out: Tensor,  # [O, I]
    inputs: Tensor,  # [B, T, I] or [B, I]
    grad_outputs: Tensor,  # [B, T, O] or [B, O]
    *,
    scale: float = 1.0,
) -> Tensor:
    """out[o, i] += scale * sum_b (sum_t grad_outputs[b, t, o] * inputs[b, t, i])^2, one example after another."""
    if inputs.dim() == 2:
        inputs, grad_outputs = inputs.unsqueeze(1), grad_outputs.unsqueeze(1)
    for a, g in zip(inputs.to(out.dtype), grad_outputs.to(out.dtype), strict=True):
        out.add_((g.T @ a).square(), alpha=scale)
    return out
