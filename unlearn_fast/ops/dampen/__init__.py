"""Selective dampening of parameters, in place."""

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast._report import DampenReport
from unlearn_fast.ops.dampen.align import Entry, align
from unlearn_fast.reference.dampen import dampen_one_

__all__ = ["DampenReport", "dampen_"]

Parameters = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]
Importances = Mapping[str, Tensor] | Sequence[Tensor]


@torch.no_grad()
def dampen_(
    params: Parameters,
    forget: Importances,
    reference: Importances,
    *,
    alpha: float,
    lam: float = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
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
        alpha: selection threshold, >= 0. Published: 10 for ResNet-18 on CIFAR.
        lam: dampening constant, >= 0. Published: 1.
        exponent: power of the ratio, > 0.
        cap: upper limit of the factor, >= 0 (`lower_bound` in the released code). It binds only if lam > alpha.

    Returns:
        A `DampenReport`: per parameter and in total the elements, selected, non-finite importances and mean factor.

    Raises:
        TypeError, ValueError: an argument does not fit. Everything is checked before the first write.

    Source: Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024.
    """
    check_settings(alpha, lam, exponent, cap)
    alignment = align(params, forget, reference)
    groups = _by_device(alignment.entries)
    tables = []
    for device, entries in groups.items():
        warn_if_slow(device.type)
        p, f, r = zip(*((e.param, e.forget, e.reference) for e in entries), strict=True)
        tables.append(
            torch.ops.unlearn_fast.dampen_(list(p), list(f), list(r), *map(float, (alpha, lam, exponent, cap)))
        )
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([t for t in p if not t.is_inference()])
    ordered = [e for entries in groups.values() for e in entries]
    if len(tables) == 1:
        stats = tables[0]
    else:  # several devices: the report gathers them, which is the only sync
        stats = torch.cat([t.cpu() for t in tables]) if tables else torch.zeros(0, 4, dtype=torch.float64)
    return DampenReport(
        tuple(e.name for e in ordered),
        tuple(e.param.numel() for e in ordered),
        stats,
        alignment.without_importance,
        alignment.tied,
    )


def check_settings(alpha: float, lam: float, exponent: float, cap: float) -> None:
    """Raises where a setting is negative, zero for the exponent, or not a number."""
    for name, value in (("alpha", alpha), ("lam", lam), ("exponent", exponent), ("cap", cap)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} is {value!r}: it must be a number")
        if math.isnan(value) or value < 0 or (name == "exponent" and value == 0):
            raise ValueError(f"{name} is {value}: it must be {'> 0' if name == 'exponent' else '>= 0'}")
    if lam > torch.finfo(torch.float32).max:
        raise ValueError(f"lam is {lam}: it must be finite in float32, because inf * 0 is no factor")


def _by_device(entries: Sequence[Entry]) -> dict[torch.device, list[Entry]]:
    groups: dict[torch.device, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.param.device, []).append(entry)
    return groups


def _dampen(
    params: list[Tensor],
    forget: list[Tensor],
    reference: list[Tensor],
    alpha: float,
    lam: float,
    exponent: float,
    cap: float,
) -> Tensor:
    triples = zip(params, forget, reference, strict=True)
    stats = [dampen_one_(p, f, r, alpha, lam, exponent, cap) for p, f, r in triples]
    return torch.stack(stats) if stats else torch.zeros(0, 4, dtype=torch.float64)


def _dampen_fake(params: list[Tensor], *_: object) -> Tensor:
    device = params[0].device if params else torch.device("cpu")
    return torch.empty(len(params), 4, dtype=torch.float64, device=device)


implement("dampen_", _dampen)
fake("dampen_", _dampen_fake)
