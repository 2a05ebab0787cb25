"""Sums of squared per-example gradients of a linear layer, without the per-example gradients."""

import torch
from torch import Tensor

from unlearn_fast import reference
from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast.ops import _checks


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
    """`out += scale * sum_b w_b G_b^2`, with `G_b[o, i] = sum_t grad_outputs[b, t, o] * inputs[b, t, i]`, in place.

    G_b is example b's gradient of the weight of `y = x @ weight.T`. The cost is that of the ordinary weight gradient,
    2 B T O I floating-point operations (twice that for T = 1 with `first`); no [B, O, I] tensor is stored.

    Args:
        out: [O, I] in float32 (float64 for float64 inputs), added to.
        inputs: the layer's inputs, [B, T, I], or [B, I] for one position an example; any strides.
        grad_outputs: the loss gradient of the layer's outputs, with O in place of I; the same dtype as `inputs`
            (float32, float64, bfloat16 or float16; 16-bit inputs are multiplied and accumulated in float32).
        scale: factor of this contribution, for example 1 / number of examples.
        weights: w_b, one an example, in out's dtype; None stands for ones.
        first: where `scale * sum_b w_b G_b` is added too; shape and dtype of `out`.
        absolute: adds |G_b| to `out`, in place of G_b^2.

    Returns:
        `out`. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or `out` or `first` has overlapping (expanded)
            memory; both are then unchanged.
    """
    _check(out, inputs, grad_outputs)
    _checks.moments(out, first, weights, inputs.shape[0])
    warn_if_slow(out.device.type, "sum_grad_squared_linear_")
    tensors = _checks.without_graph(out, inputs, grad_outputs, weights, first)
    torch.ops.unlearn_fast.sum_grad_squared_linear_.default(*tensors, scale, absolute)
    _checks.written(out, first)
    return out


def _check(out: Tensor, inputs: Tensor, grad_outputs: Tensor) -> None:
    _checks.layer_tensors(out, inputs, grad_outputs)
    if inputs.dim() not in (2, 3) or inputs.shape[:-1] != grad_outputs.shape[:-1]:
        raise ValueError(
            f"inputs has shape {_checks.shape(inputs)} and grad_outputs {_checks.shape(grad_outputs)}:"
            " they must be [B, T, I] and [B, T, O], or [B, I] and [B, O]"
        )
    if out.shape != (grad_outputs.shape[-1], inputs.shape[-1]):
        raise ValueError(
            f"out has shape {_checks.shape(out)}: it must be [O, I] = [{grad_outputs.shape[-1]}, {inputs.shape[-1]}]"
        )


def _add_squares(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    reference.sum_grad_squared_linear_(
        out, inputs, grad_outputs, scale=scale, weights=weights, first=first, absolute=absolute
    )


implement("sum_grad_squared_linear_", _add_squares)
fake("sum_grad_squared_linear_", lambda *_: None)
