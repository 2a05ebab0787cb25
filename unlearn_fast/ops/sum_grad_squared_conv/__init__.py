"""Sums of squared per-example weight gradients of a convolution, without the per-example gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_fast import reference
from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast.ops import _checks

Lengths = int | Sequence[int]


def sum_grad_squared_conv_(
    out: Tensor,  # [O, C / groups, *kernel]
    inputs: Tensor,  # [B, C, *in] or [B, W, C, *in]
    grad_outputs: Tensor,  # [B, O, *positions] or [B, W, O, *positions]
    *,
    stride: Lengths = 1,
    padding: Lengths = 0,
    dilation: Lengths = 1,
    groups: int = 1,
    scale: float = 1.0,
    weights: Tensor | None = None,  # [B]
    first: Tensor | None = None,  # [O, C / groups, *kernel]
    absolute: bool = False,
) -> Tensor:
    """`out += scale * sum_b w_b G_b^2`, with G_b example b's weight gradient of a convolution, in place.

    `G_b[o, c, k] = sum_p grad_outputs[b, o, p] * inputs[b, c, p * stride + k * dilation - padding]`, with zeros outside
    the input and, for groups, c counted within o's group: the weight gradient of `torch.nn.functional.conv1d`, `conv2d`
    or `conv3d`. The cost is that of the ordinary weight gradient; neither the unfolded input nor any per-example
    gradient is stored.

    Args:
        out: [O, C / groups, *kernel], with 1, 2 or 3 spatial axes, in float32 (float64 for float64 inputs); added to.
        inputs: the layer's inputs, [B, C, *in]; or [B, W, C, *in] for W images an example, whose gradients are summed
            before they are squared. Any strides: contiguous and channels-last inputs are read as they are.
        grad_outputs: the loss gradient of the layer's outputs, [B, O, *positions] or [B, W, O, *positions]; the same
            dtype as `inputs` (float32, float64, bfloat16 or float16; 16-bit inputs are multiplied and accumulated in
            float32).
        stride, padding, dilation: one number, or one a spatial axis; the padding is with zeros, on both sides.
        groups: how many groups of channels there are.
        scale: factor of this contribution, for example 1 / number of examples.
        weights: w_b, one an example, in out's dtype; None stands for ones.
        first: where `scale * sum_b w_b G_b` is added too; shape and dtype of `out`.
        absolute: adds |G_b| to `out`, in place of G_b^2.

    Returns:
        `out`. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape, device or setting does not fit, or `out` or `first` has overlapping
            (expanded) memory; both are then unchanged.
    """
    _checks.layer_tensors(out, inputs, grad_outputs)
    settings = _settings(out, inputs, grad_outputs, stride, padding, dilation, groups)
    _checks.moments(out, first, weights, inputs.shape[0])
    warn_if_slow(out.device.type, "sum_grad_squared_conv_")
    if inputs.dim() == out.dim():
        inputs, grad_outputs = inputs.unsqueeze(1), grad_outputs.unsqueeze(1)
    layer, moments = _checks.without_graph(out, inputs, grad_outputs), _checks.without_graph(weights, first)
    torch.ops.unlearn_fast.sum_grad_squared_conv_.default(*layer, *settings, groups, *moments, scale, absolute)
    _checks.written(out, first)
    return out


def _settings(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    stride: Lengths,
    padding: Lengths,
    dilation: Lengths,
    groups: int,
) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation of each spatial axis, after checking that they explain the shapes."""
    axes = out.dim() - 2
    if axes not in (1, 2, 3):
        raise ValueError(
            f"out has shape {_checks.shape(out)}: it must be [O, C / groups, *kernel] with 1, 2 or 3 spatial axes"
        )
    strides, paddings, dilations = (
        _lengths(name, value, axes, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    O, C = out.shape[0], out.shape[1] * groups  # noqa: E741
    if groups < 1 or O % groups:
        raise ValueError(f"groups is {groups}: it must be at least 1 and divide out's {O} rows")
    images = inputs.dim() == axes + 3
    if inputs.dim() not in (axes + 2, axes + 3) or inputs.shape[1 + images] != C:
        raise ValueError(
            f"inputs has shape {_checks.shape(inputs)}: for out {_checks.shape(out)} and groups {groups} it must be"
            f" [B, {C}, *in] or [B, W, {C}, *in] with {axes} spatial axes"
        )
    sizes = zip(inputs.shape[-axes:], out.shape[2:], strides, paddings, dilations, strict=True)
    positions = [(n + 2 * pad - dilate * (kernel - 1) - 1) // step + 1 for n, kernel, step, pad, dilate in sizes]
    if min(positions) < 1:
        raise ValueError(
            f"inputs has shape {_checks.shape(inputs)}: with padding {paddings} and dilation {dilations} it must be at"
            f" least as large as the kernel {list(out.shape[2:])}"
        )
    expected = (*inputs.shape[: 1 + images], O, *positions)
    if grad_outputs.shape != expected:
        raise ValueError(
            f"grad_outputs has shape {_checks.shape(grad_outputs)}: it must be {list(expected)}, the shape of the"
            " convolution's output"
        )
    return strides, paddings, dilations


def _lengths(name: str, value: Lengths, axes: int, least: int) -> list[int]:
    lengths = [value] * axes if isinstance(value, int) else list(value)
    if len(lengths) != axes or min(lengths) < least:
        raise ValueError(f"{name} is {value}: it must be a number, or {axes} numbers, of at least {least}")
    return lengths


def _add_squares(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    reference.sum_grad_squared_conv_(
        out,
        inputs,
        grad_outputs,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        scale=scale,
        weights=weights,
        first=first,
        absolute=absolute,
    )


implement("sum_grad_squared_conv_", _add_squares)
fake("sum_grad_squared_conv_", lambda *_: None)
