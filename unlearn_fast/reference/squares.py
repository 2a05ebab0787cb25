"""Moments of per-example gradients: out += scale * sum_b w_b G_b^2 and first += scale * sum_b w_b G_b."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight


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


def sum_grad_squared_conv_(
    out: Tensor,  # [O, C / groups, *kernel]
    inputs: Tensor,  # [B, C, *in] or [B, W, C, *in]
    grad_outputs: Tensor,  # [B, O, *positions] or [B, W, O, *positions]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    scale: float = 1.0,
    weights: Tensor | None = None,  # [B]
    first: Tensor | None = None,  # [O, C / groups, *kernel]
    absolute: bool = False,
) -> Tensor:
    """G_b: torch's weight gradient of the convolution, one example after another."""
    weight_gradient = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}[out.dim()]
    layer = (*(x if isinstance(x, int) else tuple(x) for x in (stride, padding, dilation)), groups)
    if inputs.dim() == out.dim():
        inputs, grad_outputs = inputs.unsqueeze(1), grad_outputs.unsqueeze(1)
    for b, (x, g) in enumerate(zip(inputs.to(out.dtype), grad_outputs.to(out.dtype), strict=True)):
        gradient = weight_gradient(x, out.shape, g, *layer)
        add_moments_(out, gradient, 1.0 if weights is None else weights[b], first, scale, absolute)
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
