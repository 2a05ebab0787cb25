"""What a dampening would select, and the largest scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unlearn_fast._report import SelectionCurve

Tensors = Mapping[str, Tensor] | Sequence[Tensor]


def alpha_for_percentile(forget: Tensors, reference: Tensors, q: Any) -> Any:
    """The q-th percentile of all finite f / r, interpolated linearly; for a list of q, a list."""
    pairs = zip(_values(forget), _values(reference), strict=True)
    ratios = _joined([f / r for f, r in map(_widened, pairs)])
    ratios = ratios[ratios.isfinite()].sort().values.double()
    alphas = [_percentile(ratios, percent) for percent in (q if isinstance(q, Sequence) else [q])]
    return alphas if isinstance(q, Sequence) else alphas[0]


def _percentile(ordered: Tensor, q: float) -> float:
    rank = (len(ordered) - 1) * (q / 100)
    below = int(rank)
    pair = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    return lerp(pair[0].item(), pair[1].item(), rank - below)


def lerp(a: float, b: float, t: float) -> float:
    """From the nearer end, as numpy does, so that it is monotone in t."""
    return b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t


def selection_curve(forget: Tensors, reference: Tensors, alphas: Sequence[float]) -> SelectionCurve:
    """How many elements of each tensor have f > alpha * r, for every alpha."""
    pairs = list(map(_widened, zip(_values(forget), _values(reference), strict=True)))
    counts = [[int((f > r * alpha).sum()) for alpha in alphas] for f, r in pairs]
    names = tuple(forget) if isinstance(forget, Mapping) else tuple(map(str, range(len(pairs))))
    table = torch.tensor(counts, dtype=torch.int64).view(len(pairs), len(alphas))
    return SelectionCurve(names, tuple(f.numel() for f, _ in pairs), tuple(map(float, alphas)), table)


def top_fraction_mask(scores: Tensors, fraction: float) -> Any:
    """True for the `int(fraction * n)` largest of all n scores; of equal ones, for the first."""
    tensors = _values(scores)
    joined = _joined(tensors)
    order = joined.sort(descending=True, stable=True).indices
    mask = torch.zeros(len(joined), dtype=torch.bool, device=joined.device)
    mask[order[: int(fraction * len(joined))]] = True
    parts = mask.split([t.numel() for t in tensors])
    masks = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    return dict(zip(scores, masks, strict=True)) if isinstance(scores, Mapping) else masks


def _values(tensors: Tensors) -> list[Tensor]:
    return list(tensors.values() if isinstance(tensors, Mapping) else tensors)


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]) if tensors else torch.empty(0)


def _widened(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    f, r = pair
    dtype = torch.promote_types(torch.promote_types(f.dtype, r.dtype), torch.float32)
    return f.to(dtype), r.to(dtype)
