"""Sums of squared per-example gradients of an elementwise scale or shift, without the per-example gradients."""

import torch
from torch import Tensor

from unlearn_fast import reference
from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast.ops import _checks


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
    """`out[c] += scale * sum_b weights[b] * G_b[c]^2`, `G_b[c] = sum_t grad_outputs[b, t, c] * inputs[b, t, c]`

    In place. G_b is example b's gradient of the weight of `y = weight * inputs`, such as a norm layer's, or, without
    inputs, of the bias of `y = x + bias`. One pass over the inputs: neither [B, T, C] nor [B, C] is stored.

    Args:
        out: [C] in float32 (float64 for float64 inputs), added to.
        inputs: what the weight multiplies, [B, T, C]; None for a bias.
        grad_outputs: the loss gradient of the result, [B, T, C]; float32, float64, bfloat16 or float16, the dtype of
            `inputs` too. 16-bit inputs are multiplied and accumulated in float32. Any strides: channels-first data is
            passed as `x.flatten(2).transpose(1, 2)` and read in its own order. One position an example is T = 1.
        scale: factor of this contribution, for example 1 / number of examples.
        weights: a factor of each example, [B] in out's dtype; None for ones.
        first: like `out`; `first[c] += scale * sum_b weights[b] * G_b[c]` is added to it in the same pass.
        absolute: |G_b| in place of G_b^2.

    Returns:
        `out`. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or `out` or `first` has overlapping (expanded)
            memory; `out` and `first` are then unchanged.
    """
    _check(out, inputs, grad_outputs)
    _checks.moments(out, first, weights, grad_outputs.shape[0])
    warn_if_slow(out.device.type, "sum_grad_squared_scale_")
    tensors = _checks.without_graph(out, inputs, grad_outputs, weights, first)
    torch.ops.unlearn_fast.sum_grad_squared_scale_.default(*tensors, scale, absolute)
    _checks.written(out, first)
    return out


def _check(out: Tensor, inputs: Tensor | None, grad_outputs: Tensor) -> None:
    _checks.floating("grad_outputs", grad_outputs)
    wide = torch.float64 if grad_outputs.dtype == torch.float64 else torch.float32
    if out.dtype != wide:
        raise TypeError(f"out has dtype {out.dtype}: it must be {wide} for grad_outputs in {grad_outputs.dtype}")
    if grad_outputs.dim() != 3:
        raise ValueError(f"grad_outputs has shape {_checks.shape(grad_outputs)}: it must be [B, T, C]")
    if inputs is not None:
        if inputs.dtype != grad_outputs.dtype:
            raise TypeError(f"inputs has dtype {inputs.dtype}: it must be {grad_outputs.dtype}, as grad_outputs is")
        if inputs.shape != grad_outputs.shape:
            raise ValueError(
                f"inputs has shape {_checks.shape(inputs)}: it must be that of grad_outputs,"
                f" {_checks.shape(grad_outputs)}, or inputs None"
            )
        if inputs.device != out.device:
            raise ValueError(f"out is on {out.device} and inputs on {inputs.device}: they must be on one device")
    if out.shape != grad_outputs.shape[-1:]:
        raise ValueError(f"out has shape {_checks.shape(out)}: it must be [C] = [{grad_outputs.shape[-1]}]")
    if grad_outputs.device != out.device:
        raise ValueError(
            f"out is on {out.device} and grad_outputs on {grad_outputs.device}: they must be on one device"
        )


def _add_squares(
    out: Tensor,
    inputs: Tensor | None,
    grad_outputs: Tensor,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    reference.sum_grad_squared_scale_(
        out, inputs, grad_outputs, scale=scale, weights=weights, first=first, absolute=absolute
    )


implement("sum_grad_squared_scale_", _add_squares)
fake("sum_grad_squared_scale_", lambda *_: None)
