"""Sums of squared per-example gradients of a linear layer, without the per-example gradients."""

import torch
from torch import Tensor

from unlearn_fast import reference
from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast.ops import _checks


@torch.no_grad()
def sum_grad_squared_linear_(
    out: Tensor,  # [O, I]
    inputs: Tensor,  # [B, T, I] or [B, I]
    grad_outputs: Tensor,  # [B, T, O] or [B, O]
    *,
    scale: float = 1.0,
) -> Tensor:
    """`out[o, i] += scale * sum_b (sum_t grad_outputs[b, t, o] * inputs[b, t, i])^2`, in place.

    The inner sum is example b's gradient of the weight of `y = x @ weight.T`. The cost is that of the ordinary weight
    gradient, 2 B T O I floating-point operations; no [B, O, I] tensor is stored.

    Args:
        out: [O, I] in float32 (float64 for float64 inputs), added to.
        inputs: the layer's inputs, [B, T, I], or [B, I] for one position an example; any strides.
        grad_outputs: the loss gradient of the layer's outputs, with O in place of I; the same dtype as `inputs`
            (float32, float64, bfloat16 or float16; 16-bit inputs are multiplied and accumulated in float32).
        scale: factor of this contribution, for example 1 / number of examples.

    Returns:
        `out`. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or `out` has overlapping (expanded) memory;
            `out` is then unchanged.
    """
    _check(out, inputs, grad_outputs)
    warn_if_slow(out.device.type, "sum_grad_squared_linear_")
    torch.ops.unlearn_fast.sum_grad_squared_linear_(
        out.detach(), inputs.detach(), grad_outputs.detach(), None, None, scale, False
    )
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _check(out: Tensor, inputs: Tensor, grad_outputs: Tensor) -> None:
    _checks.floating("inputs", inputs)
    if inputs.dtype != grad_outputs.dtype:
        raise TypeError(f"grad_outputs has dtype {grad_outputs.dtype}: it must be {inputs.dtype}, as inputs is")
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    if out.dtype != wide:
        raise TypeError(f"out has dtype {out.dtype}: it must be {wide} for inputs in {inputs.dtype}")
    if inputs.dim() not in (2, 3) or inputs.shape[:-1] != grad_outputs.shape[:-1]:
        raise ValueError(
            f"inputs has shape {_checks.shape(inputs)} and grad_outputs {_checks.shape(grad_outputs)}:"
            " they must be [B, T, I] and [B, T, O], or [B, I] and [B, O]"
        )
    if out.shape != (grad_outputs.shape[-1], inputs.shape[-1]):
        raise ValueError(
            f"out has shape {_checks.shape(out)}: it must be [O, I] = [{grad_outputs.shape[-1]}, {inputs.shape[-1]}]"
        )
    if inputs.device != out.device or grad_outputs.device != out.device:
        raise ValueError(
            f"out is on {out.device}, inputs on {inputs.device}, grad_outputs on {grad_outputs.device}:"
            " they must be on one device"
        )
    if _checks.may_overlap(out.shape, out.stride()):
        raise ValueError("out has overlapping (expanded) memory: give it memory of its own")


def _add_squares(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    reference.sum_grad_squared_linear_(out, inputs, grad_outputs, scale=scale)


implement("sum_grad_squared_linear_", _add_squares)
fake("sum_grad_squared_linear_", lambda *_: None)
