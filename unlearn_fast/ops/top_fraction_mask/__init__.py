"""Masks of the largest scores over all parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast.ops import _checks, _importances
from unlearn_fast.ops._order_statistics import PIECE, Keys, keys_at, keys_of

__all__ = ["top_fraction_mask"]


@torch.no_grad()
def top_fraction_mask(scores: _importances.Tensors, fraction: float) -> Any:
    """Bool masks of the largest scores over all tensors together: of exactly `int(fraction * n)` of the n scores.

    Of equal scores the first ones count, in the order of the tensors. Exact, without sorting and without a copy of the
    scores (SalUn and WAGLE sort all of them at once).

    Args:
        scores: a mapping name -> tensor, or a list; any floating dtype and shapes. SalUn's are absolute gradients.
        fraction: between 0 and 1.

    Returns:
        A dict name -> bool mask, or a list of masks, of the shapes of `scores`.

    Raises:
        TypeError, ValueError: an argument does not fit, or too few scores are numbers: NaN is never in a mask.

    Source: the saliency masks of Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency",
    ICLR 2024.
    """
    fraction = _checks.number("fraction", fraction, 0, 1)
    named = _importances.named("scores", scores)
    tensors = list(named.values())
    if len({t.device for t in tensors}) > 1:
        raise ValueError("scores is on several devices: they are compared on one, so move them to one")
    if tensors:
        warn_if_slow(tensors[0].device.type)
    count = int(fraction * sum(t.numel() for t in tensors))
    try:
        masks = torch.ops.unlearn_fast.top_fraction_mask(tensors, count)
    except RuntimeError as error:
        numbers_there = sum(int((~t.isnan()).sum()) for t in tensors)
        if numbers_there >= count:
            raise
        raise ValueError(
            f"scores has only {numbers_there} values that are not NaN: fraction {fraction} needs {count}"
        ) from error
    return dict(zip(named, masks, strict=True)) if isinstance(scores, Mapping) else masks


def _top_fraction_mask(scores: list[Tensor], count: int) -> list[Tensor]:
    """Radix selection in plain torch, on any device."""
    wide = any(t.dtype == torch.float64 for t in scores)
    keys = Keys([(t,) for t in scores], _counted, torch.float64 if wide else torch.float32)
    leading = keys.leading()
    numbers_there = int(leading.sum())
    if count > numbers_there:
        raise RuntimeError(f"scores has {numbers_there} values that are not NaN: it must have {count}")
    masks = [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in scores]
    if count == 0:
        return masks
    least = keys_at(keys, leading, [numbers_there - count])[0]
    pieces = [
        pair
        for t, mask in zip(scores, masks, strict=True)
        for pair in zip(t.flatten().split(PIECE), mask.view(-1).split(PIECE), strict=True)
    ]
    for score, mask in pieces:
        mask.copy_((keys_of(_positive_zero(score).to(keys.dtype)) > least) & ~score.isnan())
    left = count - sum(int(mask.sum()) for mask in masks)
    for score, mask in pieces:
        equal = (keys_of(_positive_zero(score).to(keys.dtype)) == least) & ~score.isnan()
        mask |= equal & (equal.cumsum(0) <= left)
        left -= min(left, int(equal.sum()))
    return masks


def _counted(scores: Tensor) -> tuple[Tensor, Tensor]:
    return _positive_zero(scores), ~scores.isnan()


def _positive_zero(scores: Tensor) -> Tensor:
    return torch.where(scores == 0, 0.0, scores)  # -0 and 0 are equal


def _fake(scores: list[Tensor], count: int) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=torch.bool, device=t.device) for t in scores]


implement("top_fraction_mask", _top_fraction_mask)
fake("top_fraction_mask", _fake)
