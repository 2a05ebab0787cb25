"""Brings parameters and importances together, and checks all of it before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_fast.ops import _checks


class Entry(NamedTuple):
    """One parameter and its importances, all with one memory layout, on one device."""

    name: str
    param: Tensor
    forget: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Alignment:
    entries: list[Entry]
    without_importance: tuple[str, ...]
    tied: dict[str, str]  # name of a repeated tensor -> name it was first listed under


def align(params: Any, forget: Any, reference: Any) -> Alignment:
    """Pairs every parameter with its two importances.

    Mappings are matched by name (a `module.` prefix on either side does not matter), lists by position.
    """
    named = _named(params)
    forget = _importances("forget", forget, named, params)
    reference = _importances("reference", reference, named, params)
    entries: list[Entry] = []
    without: list[str] = []
    tied: dict[str, str] = {}
    memory: dict[tuple[Any, ...], str] = {}
    for name, param in named.items():
        _check_parameter(name, param)
        f, r = forget.get(name), reference.get(name)
        if f is None and r is None:
            without.append(name)
            continue
        if f is None or r is None:
            absent = "forget" if f is None else "reference"
            raise ValueError(f"{absent} has no importance for {name!r}, and the other set has: give both or neither")
        place = (param.device, param.data_ptr(), param.shape, param.stride())
        if param.numel() and memory.setdefault(place, name) != name:
            tied[name] = memory[place]
            continue
        entries.append(_entry(name, param, f, r))
    _check_no_partial_overlap(entries)
    return Alignment(entries, tuple(without), tied)


def _named(params: Any) -> dict[str, Tensor]:
    if isinstance(params, nn.Module):
        return {name: param.detach() for name, param in params.named_parameters()}
    if isinstance(params, Mapping):
        pairs = list(params.items())
    elif isinstance(params, Sequence) and not isinstance(params, str):
        pairs = [(str(i), param) for i, param in enumerate(params)]
    else:
        raise TypeError(f"params is a {type(params).__name__}: it must be a module, a mapping name -> tensor, or a list")
    for name, param in pairs:
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{name!r}] is a {type(param).__name__}: it must be a tensor")
    return {_bare(str(name)): param.detach() for name, param in pairs}


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _importances(argument: str, given: Any, named: dict[str, Tensor], params: Any) -> dict[str, Tensor]:
    """The importances by parameter name."""
    if isinstance(given, Mapping):
        if not isinstance(params, (nn.Module, Mapping)):
            raise TypeError(f"{argument} is a mapping and params a list: both must be of one kind")
        by_name = {_bare(str(name)): value for name, value in given.items()}
        bare_names = {_bare(name): name for name in named}
        strangers = [name for name in by_name if name not in bare_names]
        if strangers:
            raise ValueError(f"{argument} has {strangers[0]!r} (of {len(strangers)} such names): params has no such name")
        found = {bare_names[name]: value for name, value in by_name.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != len(named):
            raise ValueError(f"{argument} has {len(given)} tensors: it must have {len(named)}, as params has")
        found = dict(zip(named, given, strict=True))
    else:
        raise TypeError(f"{argument} is a {type(given).__name__}: it must be a mapping name -> tensor, or a list")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument}[{name!r}] is a {type(value).__name__}: it must be a tensor")
        _checks.floating(f"{argument}[{name!r}]", value)
        if value.shape != named[name].shape:
            raise ValueError(
                f"{argument}[{name!r}] has shape {_checks.shape(value)}:"
                f" it must have the parameter's, {_checks.shape(named[name])}"
            )
    return found


def _check_parameter(name: str, param: Tensor) -> None:
    _checks.floating(f"params[{name!r}]", param)
    if param.layout != torch.strided:
        raise TypeError(f"params[{name!r}] has layout {param.layout}: it must be a dense (strided) tensor")
    if _checks.may_overlap(param):
        raise ValueError(f"params[{name!r}] has overlapping (expanded) memory: give it memory of its own")


def _entry(name: str, param: Tensor, f: Tensor, r: Tensor) -> Entry:
    # float64 only where it is asked for: a float64 importance keeps its selection exact for a float32 parameter.
    dtype = torch.float64 if torch.float64 in (param.dtype, f.dtype, r.dtype) else torch.float32
    f, r = (t.detach().to(device=param.device, dtype=dtype) for t in (f, r))
    # Seen in the order of its strides, a channels-last parameter is contiguous and needs no copy.
    order = sorted(range(param.dim()), key=lambda d: -param.stride(d))
    return Entry(name, *(t.permute(order) for t in (param, f, r)))


def _check_no_partial_overlap(entries: Sequence[Entry]) -> None:
    """Two parameters that share part of their memory would be dampened twice there."""
    spans = []
    for entry in entries:
        if entry.param.numel():
            last = sum((n - 1) * s for n, s in zip(entry.param.shape, entry.param.stride(), strict=True))
            start = entry.param.data_ptr()
            spans.append((str(entry.param.device), start, start + (last + 1) * entry.param.element_size(), entry))
    spans.sort(key=lambda span: span[:2])
    for (device, _, end, a), (next_device, start, _, b) in zip(spans, spans[1:], strict=False):
        if device == next_device and start < end:
            storage = a.param.untyped_storage().data_ptr()
            if storage == b.param.untyped_storage().data_ptr() and not _interleaved(a.param, b.param):
                raise ValueError(f"params {a.name!r} and {b.name!r} share part of their memory: list it once")


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Whether two overlapping ranges are certainly disjoint: rows of equal stride, side by side."""
    if a.stride() != b.stride() or not a.stride():
        return False
    inner = 1
    for size, stride in sorted(zip(a.shape, a.stride(), strict=True), key=lambda axis: axis[1]):
        if stride == inner:
            inner = stride * size
    offset = abs(a.storage_offset() - b.storage_offset())
    row = min((s for s in a.stride() if s >= inner), default=0)
    return row > 0 and inner <= offset % row <= row - inner
