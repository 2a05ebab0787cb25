"""Takes batches apart into examples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def batch_size(batch: Any) -> int:
    """B: the leading size of the first tensor in the batch."""
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise TypeError(f"batches: a {type(batch).__name__} holds no tensor with a batch axis: batches must hold tensors")


def examples(batch: Any, start: int, stop: int) -> Any:
    """The examples [start, stop): every tensor and list of leading size B is cut, everything else is kept."""
    return _cut(batch, batch_size(batch), start, stop, top=True)


def tensors_in(batch: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor)]


def with_first_again(batch: Any) -> Any:
    """The batch with its first example once more at the end."""
    return _again(batch, batch_size(batch), top=True)


def _leaves(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [leaf for value in batch.values() for leaf in _leaves(value)]
    if isinstance(batch, (tuple, list)):
        return [leaf for value in batch for leaf in _leaves(value)]
    return [batch]


def _cut(part: Any, B: int, start: int, stop: int, *, top: bool = False) -> Any:
    if isinstance(part, Tensor):
        return part[start:stop] if part.dim() and part.shape[0] == B else part
    if isinstance(part, Mapping):
        return {name: _cut(value, B, start, stop) for name, value in part.items()}
    if isinstance(part, (tuple, list)):
        if not top and len(part) == B and not any(isinstance(leaf, Tensor) for leaf in _leaves(part)):
            return part[start:stop]
        cut = [_cut(value, B, start, stop) for value in part]
        return type(part)(*cut) if hasattr(part, "_fields") else type(part)(cut)
    return part


def _again(part: Any, B: int, *, top: bool = False) -> Any:
    if isinstance(part, Tensor):
        return torch.cat([part, part[:1]]) if part.dim() and part.shape[0] == B else part
    if isinstance(part, Mapping):
        return {name: _again(value, B) for name, value in part.items()}
    if isinstance(part, (tuple, list)):
        if not top and len(part) == B and not any(isinstance(leaf, Tensor) for leaf in _leaves(part)):
            return [*part, part[0]]
        more = [_again(value, B) for value in part]
        return type(part)(*more) if hasattr(part, "_fields") else type(part)(more)
    return part
