"""Brings parameters and importances together, and checks all of it before anything is written."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_fast.ops import _checks


class Entry(NamedTuple):
    """One parameter, and its importances on its device or on the CPU; axes in the order of the parameter's strides."""

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
    tied = _tied_names(params)
    forget = _importances("forget", forget, named, tied, params)
    reference = _importances("reference", reference, named, tied, params)
    entries: list[Entry] = []
    without: list[str] = []
    at: dict[int, tuple[str, Tensor]] = {}  # first address -> the first parameter there
    for name, param in named.items():
        _check_parameter(name, param)
        f, r = forget.get(name), reference.get(name)
        if f is None and r is None:
            without.append(name)
            continue
        if f is None or r is None:
            absent = "forget" if f is None else "reference"
            raise ValueError(f"{absent} has no importance for {name!r}, and the other set has: give both or neither")
        if param.numel() and not torch.compiler.is_compiling():  # which knows no addresses
            first, same = at.setdefault(param.data_ptr(), (name, param))
            if first != name and _is_same(param, same):
                tied[name] = first
                if not (torch.equal(f, forget[first]) and torch.equal(r, reference[first])):
                    raise ValueError(
                        f"params[{name!r}] is the same tensor as {first!r}, with other importances:"
                        " it can have only one"
                    )
                continue
        entries.append(_entry(name, param, f, r))
    if not torch.compiler.is_compiling():
        _refuse_shared_memory(entries)
    return Alignment(entries, tuple(without), tied)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that begin at one address are one."""
    return a.device == b.device and a.shape == b.shape and a.stride() == b.stride()


def _named(params: Any) -> dict[str, Tensor]:
    if isinstance(params, nn.Module):
        return {name: param.detach() for name, param in params.named_parameters()}
    if isinstance(params, Mapping):
        pairs = list(params.items())
    elif isinstance(params, Sequence) and not isinstance(params, str):
        pairs = [(str(i), param) for i, param in enumerate(params)]
    else:
        raise TypeError(
            f"params is a {type(params).__name__}: it must be a module, a mapping name -> tensor, or a list"
        )
    for name, param in pairs:
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{name!r}] is a {type(param).__name__}: it must be a tensor")
    return {str(name): param.detach() for name, param in pairs}


def _tied_names(params: Any) -> dict[str, str]:
    """Further name of a module's parameter -> the name that `named_parameters` lists it under."""
    if not isinstance(params, nn.Module):
        return {}
    first = {id(param): name for name, param in params.named_parameters()}
    every = params.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in every if first[id(param)] != name}


def _importances(
    argument: str, given: Any, named: dict[str, Tensor], tied: dict[str, str], params: Any
) -> dict[str, Tensor]:
    """The importances by parameter name."""
    if isinstance(given, Mapping):
        if not isinstance(params, (nn.Module, Mapping)):
            raise TypeError(f"{argument} is a mapping and params a list: both must be of one kind")
        known = {name: name for name in named} | tied
        bare = {name.removeprefix("module."): target for name, target in known.items()}
        targets = {name: known.get(str(name), bare.get(str(name).removeprefix("module."))) for name in given}
        strangers = [name for name, target in targets.items() if target is None]
        if strangers:
            raise ValueError(
                f"{argument} has {strangers[0]!r} (of {len(strangers)} such names): params has no such name"
            )
        found: dict[str, Any] = {}
        for name, target in targets.items():
            value = given[name]
            if found.setdefault(str(target), value) is not value:
                raise ValueError(f"{argument} has two importances for {target!r}, one of them as {name!r}: give one")
    elif isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != len(named):
            raise ValueError(f"{argument} has {len(given)} tensors: it must have {len(named)}, as params has")
        found = dict(zip(named, given, strict=True))
    else:
        raise TypeError(f"{argument} is a {type(given).__name__}: it must be a mapping name -> tensor, or a list")
    for name, value in found.items():
        _checks.dense(f"{argument}[{name!r}]", value)
        if value.shape != named[name].shape:
            raise ValueError(
                f"{argument}[{name!r}] has shape {_checks.shape(value)}:"
                f" it must have the parameter's, {_checks.shape(named[name])}"
            )
    return found


def _check_parameter(name: str, param: Tensor) -> None:
    _checks.dense(f"params[{name!r}]", param)
    if not param.is_contiguous() and _checks.may_overlap(param.shape, param.stride()):
        raise ValueError(f"params[{name!r}] has overlapping (expanded) memory: give it memory of its own")


def _entry(name: str, param: Tensor, f: Tensor, r: Tensor) -> Entry:
    f, r = _brought(f, param), _brought(r, param)
    if not param.is_contiguous():  # seen in the order of its strides, a channels-last parameter is
        order = sorted(range(param.dim()), key=param.stride, reverse=True)
        param, f, r = (t.permute(order) for t in (param, f, r))
    return Entry(name, param, f, r)


def _brought(importance: Tensor, param: Tensor) -> Tensor:
    """Without a graph, and on the CPU or where the parameter is."""
    if importance.requires_grad:
        importance = importance.detach()
    return importance if importance.is_cpu else importance.to(param.device)


def on_device(entries: Sequence[Entry]) -> list[Entry]:
    """The same, with their importances where the parameters are."""
    return [
        Entry(name, p, f.to(p.device), r.to(p.device)) if p.device != f.device or p.device != r.device else entry
        for entry in entries
        for name, p, f, r in [entry]
    ]


def _refuse_shared_memory(entries: Sequence[Entry]) -> None:
    """Two parameters that share part of their memory would be dampened twice there."""
    addresses = sorted(_addresses(entry.param) for entry in entries if entry.param.numel())
    if all(end <= start for (_, end), (start, _) in itertools.pairwise(addresses)):
        return
    by_storage: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.param.numel():
            by_storage.setdefault(entry.param.untyped_storage().data_ptr(), []).append(entry)
    for sharing in by_storage.values():
        if _ranges_overlap(sharing):  # interleaved views are legal, so every element is marked
            marks = torch.zeros(sharing[0].param.untyped_storage().nbytes(), dtype=torch.bool)
            for entry in sharing:
                own = _bytes_of(entry.param, marks)
                if own.any():
                    raise ValueError(f"params[{entry.name!r}] shares part of its memory with another: list it once")
                own.fill_(True)


def _ranges_overlap(entries: Sequence[Entry]) -> bool:
    ranges = sorted(_range(entry.param) for entry in entries)
    return any(start < end for (_, end), (start, _) in itertools.pairwise(ranges))


def _addresses(t: Tensor) -> tuple[int, int]:
    """Of its first and one past its last byte."""
    start = int(t.data_ptr())
    if t.is_contiguous():
        return start, start + t.nbytes
    begin, end = _range(t)
    return start, start + end - begin


def _range(t: Tensor) -> tuple[int, int]:
    """First and one past last byte of its storage."""
    last = sum((int(n) - 1) * int(s) for n, s in zip(t.shape, t.stride(), strict=True))
    start = int(t.storage_offset())
    return start * t.element_size(), (start + last + 1) * t.element_size()


def _bytes_of(t: Tensor, storage: Tensor) -> Tensor:
    """The view of `storage`, one element a byte, that covers the memory of `t`."""
    width = t.element_size()
    return storage.as_strided((*t.shape, width), (*(s * width for s in t.stride()), 1), t.storage_offset() * width)
