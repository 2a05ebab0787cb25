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


def sum_grad_squared_embedding_(
    out: Tensor,  # [V, H]
    tokens: Tensor,  # [B, T]
    grad_outputs: Tensor,  # [B, T, H]
    *,
    scale: float = 1.0,
    weights: Tensor | None = None,  # [B]
    first: Tensor | None = None,  # [V, H]
    absolute: bool = False,
) -> Tensor:
    """out[v] += scale * sum_b weights[b] * (sum_{t: tokens[b, t] = v} grad_outputs[b, t])^2, tokens below 0 skipped."""
    for b, (y, g) in enumerate(zip(tokens, grad_outputs.to(out.dtype), strict=True)):
        rows, index = y[y >= 0].unique(return_inverse=True)
        gradient = g.new_zeros(len(rows), g.shape[-1]).index_add(0, index, g[y >= 0])
        weight = 1 if weights is None else weights[b]
        out.index_add_(0, rows, weight * _moment(gradient, absolute), alpha=scale)
        if first is not None:
            first.index_add_(0, rows, weight * gradient, alpha=scale)
    return out


def sum_grad_squared_scale_(
    out: Tensor,  # [C]
    inputs: Tensor | None,  # [B, T, C], or None: ones
    grad_outputs: Tensor,  # [B, T, C]
    *,
    scale: float = 1.0,
    weights: Tensor | None = None,  # [B]
    first: Tensor | None = None,  # [C]
    absolute: bool = False,
) -> Tensor:
    """out[c] += scale * sum_b weights[b] * (sum_t grad_outputs[b, t, c] * inputs[b, t, c])^2, example after example."""
    for b, g in enumerate(grad_outputs.to(out.dtype)):
        gradient = (g if inputs is None else g * inputs[b].to(out.dtype)).sum(0)
        weight = 1 if weights is None else weights[b]
        out.add_(weight * _moment(gradient, absolute), alpha=scale)
        if first is not None:
            first.add_(weight * gradient, alpha=scale)
    return out


def _moment(gradient: Tensor, absolute: bool) -> Tensor:
    return gradient.abs() if absolute else gradient.square()
