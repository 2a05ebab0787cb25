"""Checks of arguments that several operators share. An error names the argument, what was wrong, what is right."""

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


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements of the tensor may share memory (an expanded tensor, or overlapping strides)."""
    axes = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach = 0  # the furthest offset that the axes so far address
    for stride, size in axes:
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False
