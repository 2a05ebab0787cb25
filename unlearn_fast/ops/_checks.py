"""Checks of arguments that several operators share. An error names the argument, what was wrong, what is right."""

from collections.abc import Sequence

from torch import Tensor, float16, float32, float64, int32, int64
from torch import bfloat16 as _bfloat16

FLOATING = (float32, float64, _bfloat16, float16)


def shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in tensor.shape) + "]"


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {tensor.dtype}: it must be float32, float64, bfloat16 or float16")


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
    """What the sums of squared per-example gradients share: one weight an example, and where the first moment goes."""
    if weights is not None:
        if weights.dtype != out.dtype:
            raise TypeError(f"weights has dtype {weights.dtype}: it must be {out.dtype}, as out is")
        if weights.shape != (B,):
            raise ValueError(f"weights has shape {shape(weights)}: it must be [B] = [{B}]")
        if weights.device != out.device:
            raise ValueError(f"weights is on {weights.device} and out on {out.device}: they must be on one device")
    if first is not None:
        if first.dtype != out.dtype:
            raise TypeError(f"first has dtype {first.dtype}: it must be {out.dtype}, as out is")
        if first.shape != out.shape:
            raise ValueError(f"first has shape {shape(first)}: it must be that of out, {shape(out)}")
        if first.device != out.device:
            raise ValueError(f"first is on {first.device} and out on {out.device}: they must be on one device")
        if first is out:
            raise ValueError("first is out itself: give it a tensor of its own")
        if may_overlap(first.shape, first.stride()):
            raise ValueError("first has overlapping (expanded) memory: give it memory of its own")
