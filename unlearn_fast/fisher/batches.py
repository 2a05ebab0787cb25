"""Takes batches apart into examples."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
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
    return _along_examples(batch, batch_size(batch), lambda part: part[start:stop])


def tensors_in(batch: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor)]


def with_first_again(batch: Any) -> Any:
    """The batch with its first example once more at the end."""
    return _along_examples(batch, batch_size(batch), _again)


def in_own_containers(batch: Any, *, copies: bool = False) -> Any:
    """The same batch, but what is taken out of its containers stays in the caller's; with `copies`, so do the values of
    its tensors."""
    return _mapped(batch, lambda part: (part.clone() if copies else part) if isinstance(part, Tensor) else None)


def _leaves(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [leaf for value in batch.values() for leaf in _leaves(value)]
    if isinstance(batch, (tuple, list)):
        return [leaf for value in batch for leaf in _leaves(value)]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [leaf for value in vars(batch).values() for leaf in _leaves(value)]
    return [batch]


def _again(part: Tensor | list[Any] | tuple[Any, ...]) -> Any:
    return torch.cat([part, part[:1]]) if isinstance(part, Tensor) else type(part)([*part, part[0]])


def _along_examples(batch: Any, B: int, change: Callable[[Any], Any]) -> Any:
    """Changes every tensor of leading size B, and lists of B things that are no tensors."""

    def changed(part: Any) -> Any:
        if isinstance(part, Tensor):
            return change(part) if part.dim() and part.shape[0] == B else part
        plain = isinstance(part, (tuple, list)) and not any(isinstance(leaf, Tensor) for leaf in _leaves(part))
        return change(part) if plain and len(part) == B and part is not batch else None

    return _mapped(batch, changed)


def _mapped(part: Any, change: Callable[[Any], Any]) -> Any:
    """Each part as `change` has it, or, where that is None, with its own parts mapped. Containers keep their type."""

    def inside(value: Any) -> Any:
        return _mapped(value, change)

    if (changed := change(part)) is not None:
        return changed
    if isinstance(part, Mapping):
        return _with_values(part, {name: inside(value) for name, value in part.items()})
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        copied: Any = copy.copy(part)
        for name, value in vars(part).items():
            object.__setattr__(copied, name, inside(value))
        return copied
    if isinstance(part, (tuple, list)):
        parts = [inside(value) for value in part]
        kind: Any = type(part)
        return kind(*parts) if hasattr(part, "_fields") else kind(parts)
    return part


def _with_values(mapping: Mapping[str, Any], values: dict[str, Any]) -> Any:
    """A mapping of the same type, such as the BatchEncoding of tokenizers, whose values are attributes too."""
    if type(mapping) is dict:
        return values
    changed: Any = copy.copy(mapping)
    try:
        for name, value in values.items():
            changed[name] = value
    except TypeError:  # it cannot be changed
        return values
    return changed
