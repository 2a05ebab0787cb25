"""Checks of arguments that several operators share. An error names the argument, what was wrong, what is right."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, float16, float32, float64, int32, int64
from torch import bfloat16 as _bfloat16

FLOATING = (float32, float64, _bfloat16, float16)


def shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in tensor.shape) + "]"


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False) -> float:
    """The value, where it is a number between low and high, or above low."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}: it must be a number")
    wanted = f"between {low:g} and {high:g}" if high < math.inf else f"{'>' if above else '>='} {low:g}"
    if not low <= float(value) <= high or (above and value == low):  # NaN neither
        raise ValueError(f"{name} is {value}: it must be {wanted}")
    return float(value)


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {tensor.dtype}: it must be float32, float64, bfloat16 or float16")


def dense(name: str, value: Any) -> None:
    """`value` is a floating tensor with strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: it must be a tensor")
    floating(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: it must be a dense (strided) tensor")


def labels_of_rows(name: str, labels: Tensor, rows_name: str, rows: Tensor) -> None:
    """`labels` is an integer tensor with the leading shape of `rows`, on its device."""
    if labels.dtype not in (int32, int64):
        raise TypeError(f"{name} has dtype {labels.dtype}: it must be int64 or int32")
    if rows.dim() == 0 or labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"{name} has shape {shape(labels)} and {rows_name} {shape(rows)}:"
            f" {name} must have the shape of {rows_name} without its last axis"
        )
    if labels.device != rows.device:
        raise ValueError(f"{name} is on {labels.device} and {rows_name} on {rows.device}: they must be on one device")


def lm_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, hidden_name: str = "") -> None:
    """`weight` [V, H] and `bias` [V] turn `hidden` [..., H] into logits; `prefix` is that of their names."""
    hidden_name = hidden_name or f"{prefix}hidden"
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight has shape {shape(weight)}:"
            f" it must be [V, H] with H = {hidden.shape[-1]}, as in {hidden_name}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias has shape {shape(bias)}: it must be [V] with V = {len(weight)}, as in {prefix}weight"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{prefix}{name} is {tensor.dtype} on {tensor.device}:"
                f" it must be {hidden.dtype} on {hidden.device}, as {hidden_name} is"
            )


def accumulation(chunk_bytes: int | None, weight_grad_dtype: torch.dtype | None, weight: Tensor) -> None:
    """How much of the logits may exist at a time, and what the gradient of the weight is summed up in."""
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}: it must be at least 1, or None")
    wide = torch.promote_types(weight.dtype, float32)
    if weight_grad_dtype not in (None, weight.dtype, wide):
        choices = dict.fromkeys((weight.dtype, wide))
        raise ValueError(
            f"weight_grad_dtype is {weight_grad_dtype}: it must be None or {' or '.join(map(str, choices))}"
        )


def may_overlap(shape: Sequence[int], strides: Sequence[int], width: int = 1) -> bool:
    """Whether two elements may share memory (expanded or sliding views); true for reversed axes.

    `width` is that of an element, in the unit of the strides.
    """
    if 0 in shape:
        return False
    reach = width - 1  # the furthest offset that the axes so far address
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def moments(out: Tensor, first: Tensor | None, weights: Tensor | None, B: int) -> None:
    """What the sums over B examples are added to, and the examples' weights: `out` holds the sum of squares or
    magnitudes, `first` that of the gradients themselves."""
    own_memory("out", out)
    if first is not None:
        if first.dtype != out.dtype:
            raise TypeError(f"first has dtype {first.dtype}: it must be {out.dtype}, as out is")
        if first.shape != out.shape:
            raise ValueError(f"first has shape {shape(first)}: it must be {shape(out)}, as out is")
        if first.device != out.device:
            raise ValueError(f"first is on {first.device} and out on {out.device}: they must be on one device")
        own_memory("first", first)
        if not torch.compiler.is_compiling() and ranges_overlap(out, first):
            raise ValueError("first shares memory with out: give it memory of its own")
    if weights is not None:
        if weights.dtype != out.dtype:
            raise TypeError(f"weights has dtype {weights.dtype}: it must be {out.dtype}, as out is")
        if weights.shape != (B,):
            raise ValueError(f"weights has shape {shape(weights)}: it must be [B] = [{B}], one an example")
        if weights.device != out.device:
            raise ValueError(f"weights is on {weights.device} and out on {out.device}: they must be on one device")


def own_memory(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous() and may_overlap(tensor.shape, tensor.stride()):
        raise ValueError(f"{name} has overlapping (expanded) memory: give it memory of its own")


def ranges_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the tensors lie in one storage, between one another's first and last elements."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    starts, ends = zip(*(_element_range(t) for t in (a, b)), strict=True)
    return max(starts) < min(ends)


def _element_range(t: Tensor) -> tuple[int, int]:
    start = t.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()


def layer_tensors(out: Tensor, inputs: Tensor, grad_outputs: Tensor) -> None:
    """A layer's inputs and the gradients of its outputs: dtypes and devices."""
    floating("inputs", inputs)
    if inputs.dtype != grad_outputs.dtype:
        raise TypeError(f"grad_outputs has dtype {grad_outputs.dtype}: it must be {inputs.dtype}, as inputs is")
    wide = float64 if inputs.dtype == float64 else float32
    if out.dtype != wide:
        raise TypeError(f"out has dtype {out.dtype}: it must be {wide} for inputs in {inputs.dtype}")
    if inputs.device != out.device or grad_outputs.device != out.device:
        raise ValueError(
            f"out is on {out.device}, inputs on {inputs.device}, grad_outputs on {grad_outputs.device}:"
            " they must be on one device"
        )


def without_graph(*tensors: Tensor | None) -> list[Any]:
    """The same values, in which autograd takes no interest."""
    return [t.detach() if t is not None and t.requires_grad else t for t in tensors]


def written(*tensors: Tensor | None) -> None:
    """Tells autograd what was changed: operators registered through the stable ABI do not."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
