"""Selective dampening: the published formula, and putting its changes back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unlearn_fast._report import DampenReport

Tensors = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]

RUN = 65536  # elements of one tensor that a record describes together


def dampen_(
    params: Tensors,
    forget: Mapping[str, Tensor] | Sequence[Tensor],
    reference: Mapping[str, Tensor] | Sequence[Tensor],
    *,
    alpha: float | Mapping[str, float],
    lam: float | Mapping[str, float] = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
) -> DampenReport:
    """p <- p * max(min((lam * r / f)^exponent, cap), floor) where f > alpha * r, in place; names and shapes must agree.

    alpha and lam: one for all, or name -> value.
    """
    if isinstance(params, nn.Module):
        params = dict(params.named_parameters())
    p = params if isinstance(params, Mapping) else {str(i): tensor for i, tensor in enumerate(params)}
    f, r = (x if isinstance(x, Mapping) else dict(zip(p, x, strict=True)) for x in (forget, reference))
    names = tuple(name for name in p if name in f and name in r)
    alphas, lams = (tuple(s[n] if isinstance(s, Mapping) else s for n in names) for s in (alpha, lam))
    stats = [
        dampen_one_(p[name], f[name], r[name], a, lam_, exponent, cap, floor)
        for name, a, lam_ in zip(names, alphas, lams, strict=True)
    ]
    table = torch.stack(stats) if stats else torch.zeros(0, 4, dtype=torch.float64)
    return DampenReport(names, tuple(p[n].numel() for n in names), table, tuple(n for n in p if n not in names))


@torch.no_grad()
def dampen_one_(
    p: Tensor, f: Tensor, r: Tensor, alpha: float, lam: float, exponent: float, cap: float, floor: float
) -> Tensor:  # [4] float64: selected, non-finite importances, non-finite selected parameters, sum of factors
    """Dampens one tensor in place, computing in at least float32."""
    f, r = _computed_in(p, f, r)
    selected = f > r * alpha
    factor = ((r * lam) / f) ** exponent
    factor = factor.masked_fill(f.isinf(), 0)  # lam * r may overflow, and inf / inf is no factor
    factor = torch.where(factor > cap, cap, factor)  # not clamp: NaN stays NaN
    factor = torch.where(factor < floor, floor, factor)
    wide = p.to(f.dtype)
    counts = [selected, ~(f.isfinite() & r.isfinite()), selected & ~wide.isfinite()]
    sums = [c.sum().double() for c in counts] + [torch.where(selected, factor, 0).double().sum()]
    p.copy_(torch.where(selected, (wide * factor).to(p.dtype), p))
    return torch.stack(sums)


def _computed_in(p: Tensor, f: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(p.dtype, f.dtype), torch.promote_types(r.dtype, torch.float32))
    return f.to(p.device, dtype), r.to(p.device, dtype)


@torch.no_grad()
def dampen_record(
    params: Sequence[Tensor], forget: Sequence[Tensor], reference: Sequence[Tensor], alpha: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the elements with f > alpha * r: how many each run of 65,536 has (int64), their places in it (uint16), and
    their values, as bytes."""
    device = params[0].device if params else torch.device("cpu")
    counts, offsets, values = (
        [torch.empty(0, dtype=d, device=device)] for d in (torch.int64, torch.int32, torch.uint8)
    )
    for p, f, r, a in zip(params, forget, reference, alpha, strict=True):
        f, r = _computed_in(p, f, r)
        index = (f > r * a).flatten().nonzero().flatten()
        counts.append(torch.bincount(index // RUN, minlength=-(-p.numel() // RUN)))
        offsets.append((index % RUN).int())
        values.append(p.take(index).view(torch.uint8))
    return torch.cat(counts), torch.cat(offsets).to(torch.uint16), torch.cat(values)


@torch.no_grad()
def dampen_undo_(params: Sequence[Tensor], counts: Tensor, offsets: Tensor, values: Tensor) -> None:
    """Writes what `dampen_record` found."""
    for p in params:
        runs = -(-p.numel() // RUN)
        of_runs, counts = counts[:runs], counts[runs:]
        n = int(of_runs.sum())
        first = torch.arange(runs, device=p.device).repeat_interleave(of_runs) * RUN
        index = first + offsets[:n].to(torch.int64)
        old = values[: n * p.element_size()].clone().view(p.dtype)  # a copy begins where its dtype may
        p.put_(index, old)
        offsets, values = offsets[n:], values[n * p.element_size() :]
