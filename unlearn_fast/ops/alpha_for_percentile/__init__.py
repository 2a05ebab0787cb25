"""The alpha above which a given share of all parameters would be selected."""

import numbers
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast.ops import _checks, _importances
from unlearn_fast.ops._order_statistics import Keys, keys_at, value_of
from unlearn_fast.reference.selection import lerp

__all__ = ["alpha_for_percentile"]


@overload
def alpha_for_percentile(forget: _importances.Tensors, reference: _importances.Tensors, q: float) -> float: ...
@overload
def alpha_for_percentile(
    forget: _importances.Tensors, reference: _importances.Tensors, q: Sequence[float]
) -> list[float]: ...
@torch.no_grad()
def alpha_for_percentile(forget: Any, reference: Any, q: Any) -> Any:
    """The q-th percentile of the ratios `f / r` of all parameters together: `dampen_(alpha=...)` with it selects the
    share `1 - q / 100` of those whose ratio is finite.

    Exact, as `numpy.percentile(ratios[isfinite(ratios)], q)` in float64 with its linear interpolation, at any size: the
    ratios are never stored. One q takes two passes over f and r in float32, four in float64; several q share the first,
    and some of them each further one. That needs 64 MiB on a CPU of up to 120 threads, and below 1 GiB elsewhere.

    Args:
        forget, reference: importances f and r: mappings name -> tensor with the same names, or lists of tensors, of one
            shape each; any floating dtype. The ratio is computed in float32, or in float64 where one of the two is.
        q: a percentile between 0 and 100, or a list of them.

    Returns:
        A float, or a list of floats. Ratios that are infinite or NaN (r = 0) do not count.

    Raises:
        TypeError, ValueError: an argument does not fit, or no ratio is finite.

    Source: the selection of ASSD: Schoepf, Foster, Brintrup, "Parameter-tuning-free data entry error unlearning with
    adaptive selective synaptic dampening", 2024.
    """
    many = isinstance(q, Sequence) and not isinstance(q, str)
    if not many and not isinstance(q, numbers.Real):
        raise TypeError(f"q is {q!r}: it must be a number, or a list of numbers")
    percents = [_checks.number("q", percent, 0, 100) for percent in (q if many else [q])]
    _, f, r = _importances.both(forget, reference)
    if len({t.device for t in f}) > 1:
        raise ValueError("forget is on several devices: its ratios are compared on one, so move it to one")
    if f:
        warn_if_slow(f[0].device.type)
    neighbours, count = torch.ops.unlearn_fast.alpha_for_percentile(f, r, percents)
    n = int(count)
    if n == 0:
        raise ValueError("forget and reference have no finite ratio f / r: alpha cannot be chosen from them")
    alphas = []
    for percent, (below, above) in zip(percents, neighbours.tolist(), strict=True):
        rank = (n - 1) * (percent / 100)
        alphas.append(lerp(below, above, rank - int(rank)))
    return alphas if many else alphas[0]


def _alpha_for_percentile(forget: list[Tensor], reference: list[Tensor], q: list[float]) -> tuple[Tensor, Tensor]:
    """Radix selection in plain torch, some elements at a time, on any device."""
    wide = any(t.dtype == torch.float64 for t in [*forget, *reference])
    keys = Keys(list(zip(forget, reference, strict=True)), _ratio, torch.float64 if wide else torch.float32)
    leading = keys.leading()
    n = int(leading.sum())
    device = forget[0].device if forget else torch.device("cpu")
    if n == 0:
        neighbours = torch.zeros((len(q), 2), dtype=torch.float64, device=device)
    else:
        ranks = [rank for percent in q for rank in _around((n - 1) * (percent / 100), n)]
        values = [value_of(key, keys.dtype) for key in keys_at(keys, leading, ranks)]
        neighbours = torch.tensor(values, dtype=torch.float64, device=device).view(-1, 2)
    return neighbours, torch.tensor(n, device=device)


def _around(rank: float, n: int) -> tuple[int, int]:
    return int(rank), min(int(rank) + 1, n - 1)


def _ratio(f: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The ratios, and which of them count."""
    dtype = torch.promote_types(torch.promote_types(f.dtype, r.dtype), torch.float32)
    ratio = f.to(dtype) / r.to(dtype)
    return ratio, ratio.isfinite()


def _fake(forget: list[Tensor], reference: list[Tensor], q: list[float]) -> tuple[Tensor, Tensor]:
    device = forget[0].device if forget else torch.device("cpu")
    return (
        torch.empty(len(q), 2, dtype=torch.float64, device=device),
        torch.empty((), dtype=torch.int64, device=device),
    )


implement("alpha_for_percentile", _alpha_for_percentile)
fake("alpha_for_percentile", _fake)
