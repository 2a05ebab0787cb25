"""Moments of per-example gradients: out += scale * sum_b w_b G_b^2 and first += scale * sum_b w_b G_b."""

from torch import Tensor


def add_moments_(
    out: Tensor, gradient: Tensor, weight: Tensor | float, first: Tensor | None, scale: float, absolute: bool
) -> None:
    """Adds one example's gradient G_b, of weight w_b, to `out` and `first`."""
    out.add_((gradient.abs() if absolute else gradient.square()) * weight, alpha=scale)
    if first is not None:
        first.add_(gradient * weight, alpha=scale)


def sum_grad_squared_linear_(
    out: Tensor,  # [O, I]
    inputs: Tensor,  # [B, T, I] or [B, I]
    grad_outputs: Tensor,  # [B, T, O] or [B, O]
    *,
    scale: float = 1.0,
    weights: Tensor | None = None,  # [B]
    first: Tensor | None = None,  # [O, I]
    absolute: bool = False,
) -> Tensor:
    """G_b[o, i] = sum_t grad_outputs[b, t, o] * inputs[b, t, i], one example after another."""
    if inputs.dim() == 2:
        inputs, grad_outputs = inputs.unsqueeze(1), grad_outputs.unsqueeze(1)
    for b, (a, g) in enumerate(zip(inputs.to(out.dtype), grad_outputs.to(out.dtype), strict=True)):
        add_moments_(out, g.T @ a, 1.0 if weights is None else weights[b], first, scale, absolute)
    return out
