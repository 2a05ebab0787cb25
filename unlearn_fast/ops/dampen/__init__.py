"""Selective dampening of parameters, in place."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast._report import DampenReport
from unlearn_fast.ops import _checks
from unlearn_fast.ops.dampen.align import Entry, align, on_device
from unlearn_fast.ops.dampen.settings import Setting, by_parameter, check_settings
from unlearn_fast.ops.dampen.stream import dampen_streamed_
from unlearn_fast.ops.dampen.undo import UndoLog, log_for, undo_
from unlearn_fast.reference.dampen import dampen_one_

__all__ = ["DampenReport", "Setting", "UndoLog", "check_settings", "dampen_", "undo_"]

Parameters = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]
Importances = Mapping[str, Tensor] | Sequence[Tensor]

SEGMENT = 1 << 26  # elements that are recorded, and then dampened, together


@torch.no_grad()
def dampen_(
    params: Parameters,
    forget: Importances,
    reference: Importances,
    *,
    alpha: Setting,
    lam: Setting = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
    undo: bool | UndoLog = False,
) -> DampenReport:
    """Selective synaptic dampening, in place: `p *= min((lam * r / f)^exponent, cap)` where `f > alpha * r`.

    f and r are a parameter's importance to the forget set and to the reference set (diagonal Fisher information, see
    `diagonal_fisher`). f = 0 leaves p unchanged; r = 0 < f makes it exactly 0; a NaN importance leaves it unchanged and
    is counted in the report. Float32 results equal the released code bit for bit for exponents 1, 2 and 3; other powers
    are rounded correctly, which torch's own are not always. 16-bit parameters are computed in float32 and rounded once.

    Args:
        params: a module, a mapping name -> tensor, or a list. Any shape and strides, but no expanded memory. A tensor
            that is listed twice is dampened once.
        forget, reference: importances f and r: mappings name -> tensor, or lists aligned with `params` (with
            `params.parameters()` for a module). Any floating dtype and device; names may carry a `module.` prefix.
            Named parameters that have neither stay unchanged and are listed in the report.
        alpha: selection threshold, >= 0. Published: 10 for ResNet-18 on CIFAR. One number, or one for each parameter:
            a function of the name, or a mapping whose keys are names, beginnings of names up to a dot ("layer4"), or
            ranges of layers ("model.layers[8:16]", "model.layers[8:].mlp"); of several keys that fit, the one that
            fits most of the name counts, and "" fits all. What no key fits, or where the function returns None, stays
            unchanged and is listed in the report.
        lam: dampening constant, >= 0. Published: 1. One number, or one for each parameter, as `alpha`.
        exponent: power of the ratio, > 0.
        cap: upper limit of the factor, >= 0 (`lower_bound` in the released code). It binds only if lam > alpha.
        floor: lower limit of the factor, >= 0: no value shrinks below that share of itself. Published: 0.
        undo: True keeps what is changed in the report's `undo`, for `undo_`; an `UndoLog` is filled on the way.

    Returns:
        A `DampenReport`: per parameter and in total the elements, selected, non-finite importances and mean factor.

    Raises:
        TypeError, ValueError: an argument does not fit. Everything is checked before the first write.

    Source: Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024.
    """
    check_settings(alpha, lam, exponent, cap, floor)
    log = log_for(undo)
    alignment = align(params, forget, reference)
    chosen = choose(alignment.entries, alpha, lam)
    tables = []
    for part in _parts(chosen.entries, None if log is None else SEGMENT):
        entries = [chosen.entries[i] for i in part]
        alphas, lams = ([values[i] for i in part] for values in (chosen.alpha, chosen.lam))
        if log is not None:
            log.record(entries := on_device(entries), alphas)
        try:
            tables.append(apply_(entries, alphas, lams, exponent, cap, floor))
        finally:
            if log is not None:
                log.applied()
    if len({t.device for t in tables}) > 1:  # the report gathers them, which is the only sync
        tables = [t.cpu() for t in tables]
    return DampenReport(
        names=tuple(e.name for e in chosen.entries),
        elements=tuple(e.param.numel() for e in chosen.entries),
        stats=torch.cat(tables) if tables else torch.zeros(0, 4, dtype=torch.float64),
        without_importance=alignment.without_importance,
        tied=alignment.tied,
        left_out=chosen.left_out,
        alpha=tuple(chosen.alpha),
        lam=tuple(chosen.lam),
        undo=log,
    )


class Chosen(NamedTuple):
    """The parameters that have settings, by device, and their settings."""

    entries: list[Entry]
    alpha: list[float]
    lam: list[float]
    left_out: tuple[str, ...]  # by alpha


def choose(entries: Sequence[Entry], alpha: Setting, lam: Setting) -> Chosen:
    """Gives every parameter its settings; those on one device follow one another."""
    devices = list(dict.fromkeys(entry.param.device for entry in entries))
    ordered = entries
    if len(devices) > 1:
        ordered = sorted(entries, key=lambda entry: devices.index(entry.param.device))
    names = [entry.name for entry in ordered]
    alphas, lams = by_parameter("alpha", alpha, names), by_parameter("lam", lam, names)
    chosen = Chosen([], [], [], tuple(name for name, value in zip(names, alphas, strict=True) if value is None))
    for entry, of_alpha, of_lam in zip(ordered, alphas, lams, strict=True):
        if of_alpha is None:
            continue
        if of_lam is None:
            raise ValueError(f"lam has nothing for {entry.name!r}, which alpha has: give both, or no alpha")
        chosen.entries.append(entry)
        chosen.alpha.append(of_alpha)
        chosen.lam.append(of_lam)
    return chosen


def apply_(
    entries: Sequence[Entry], alphas: list[float], lams: list[float], exponent: float, cap: float, floor: float
) -> Tensor:  # [len(entries), 4]
    """Dampens parameters on one device."""
    device = entries[0].param.device
    warn_if_slow(device.type)
    operator, rest = torch.ops.unlearn_fast.dampen_, (float(exponent), float(cap), float(floor))

    def dampen(indices: list[int], p: list[Tensor], f: list[Tensor], r: list[Tensor]) -> Tensor:
        return operator(p, f, r, [alphas[i] for i in indices], [lams[i] for i in indices], *rest)

    params = [entry.param for entry in entries]
    try:
        if device.type == "cpu" or all(t.device == device for e in entries for t in (e.forget, e.reference)):
            return operator(params, [e.forget for e in entries], [e.reference for e in entries], alphas, lams, *rest)
        return dampen_streamed_(entries, dampen)
    finally:  # what is interrupted has written some of it
        _checks.written(*params)


def _parts(entries: Sequence[Entry], segment: int | None) -> Iterator[list[int]]:
    """Entries that are dampened by one call: on one device, and of about `segment` elements where that is given."""
    part: list[int] = []
    filled, device = 0, None
    for i, entry in enumerate(entries):
        n = entry.param.numel() if segment else 0
        if part and (entry.param.device != device or (segment and filled + n > segment)):
            yield part
            part, filled = [], 0
        part.append(i)
        filled, device = filled + n, entry.param.device
    if part:
        yield part


def _dampen(
    params: list[Tensor],
    forget: list[Tensor],
    reference: list[Tensor],
    alpha: list[float],
    lam: list[float],
    exponent: float,
    cap: float,
    floor: float,
) -> Tensor:
    rows = zip(params, forget, reference, alpha, lam, strict=True)
    stats = [dampen_one_(p, f, r, a, lam_, exponent, cap, floor) for p, f, r, a, lam_ in rows]
    return torch.stack(stats) if stats else torch.zeros(0, 4, dtype=torch.float64)


def _dampen_fake(params: list[Tensor], *_: object) -> Tensor:
    device = params[0].device if params else torch.device("cpu")
    return torch.empty(len(params), 4, dtype=torch.float64, device=device)


implement("dampen_", _dampen)
fake("dampen_", _dampen_fake)
