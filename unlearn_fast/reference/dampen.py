"""Selective dampening: the published formula."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unlearn_fast._report import DampenReport

Tensors = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]


def dampen_(
    params: Tensors,
    forget: Mapping[str, Tensor] | Sequence[Tensor],
    reference: Mapping[str, Tensor] | Sequence[Tensor],
    *,
    alpha: float,
    lam: float = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
) -> DampenReport:
    """p <- p * min((lam * r / f)^exponent, cap) where f > alpha * r, in place; names and shapes must agree."""
    if isinstance(params, nn.Module):
        params = dict(params.named_parameters())
    p = params if isinstance(params, Mapping) else {str(i): tensor for i, tensor in enumerate(params)}
    f, r = (x if isinstance(x, Mapping) else dict(zip(p, x, strict=True)) for x in (forget, reference))
    names = tuple(name for name in p if name in f and name in r)
    stats = [dampen_one_(p[name], f[name], r[name], alpha, lam, exponent, cap) for name in names]
    table = torch.stack(stats) if stats else torch.zeros(0, 4, dtype=torch.float64)
    return DampenReport(names, tuple(p[n].numel() for n in names), table, tuple(n for n in p if n not in names))


@torch.no_grad()
def dampen_one_(
    p: Tensor, f: Tensor, r: Tensor, alpha: float, lam: float, exponent: float, cap: float
) -> Tensor:  # [4] float64: selected, non-finite importances, non-finite selected parameters, sum of factors
    """Dampens one tensor in place, computing in at least float32."""
    dtype = torch.promote_types(torch.promote_types(p.dtype, f.dtype), torch.promote_types(r.dtype, torch.float32))
    f, r = f.to(p.device, dtype), r.to(p.device, dtype)
    selected = f > r * alpha
    factor = ((r * lam) / f) ** exponent
    factor = factor.masked_fill(f.isinf(), 0)  # lam * r may overflow, and inf / inf is no factor
    factor = torch.where(factor > cap, cap, factor)  # not clamp: NaN stays NaN
    wide = p.to(dtype)
    counts = [selected, ~(f.isfinite() & r.isfinite()), selected & ~wide.isfinite()]
    sums = [c.sum().double() for c in counts] + [torch.where(selected, factor, 0).double().sum()]
    p.copy_(torch.where(selected, (wide * factor).to(p.dtype), p))
    return torch.stack(sums)
