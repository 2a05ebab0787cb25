"""How much any alpha would select."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast._report import SelectionCurve
from unlearn_fast.ops import _checks, _importances

__all__ = ["SelectionCurve", "selection_curve"]


@torch.no_grad()
def selection_curve(
    forget: _importances.Tensors, reference: _importances.Tensors, alphas: Sequence[float]
) -> SelectionCurve:
    """How many elements of each tensor `f > alpha * r` selects, for all alphas in one pass over f and r.

    Args:
        forget, reference: importances f and r: mappings name -> tensor with the same names, or lists of tensors, of one
            shape each; any floating dtype.
        alphas: thresholds, each >= 0.

    Returns:
        A `SelectionCurve`: counts by tensor and alpha, as `dampen_` with that alpha would select; `plot` draws it.
        (But `dampen_` compares in float64 where the parameter is float64, here only where an importance is.)

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if isinstance(alphas, str) or not isinstance(alphas, Sequence):
        raise TypeError(f"alphas is a {type(alphas).__name__}: it must be a list of numbers")
    thresholds = [_checks.number(f"alphas[{i}]", alpha) for i, alpha in enumerate(alphas)]
    names, f, r = _importances.both(forget, reference)
    tables: dict[int, Tensor] = {}
    for device in dict.fromkeys(t.device for t in f):
        warn_if_slow(device.type)
        rows = [i for i, t in enumerate(f) if t.device == device]
        table = torch.ops.unlearn_fast.selection_curve([f[i] for i in rows], [r[i] for i in rows], thresholds)
        tables |= dict(zip(rows, table.cpu(), strict=True))
    counts = [tables[i] for i in range(len(f))]
    table = torch.stack(counts) if counts else torch.zeros(0, len(thresholds), dtype=torch.int64)
    return SelectionCurve(names, tuple(t.numel() for t in f), tuple(thresholds), table)


def _selection_curve(forget: list[Tensor], reference: list[Tensor], alphas: list[float]) -> Tensor:
    rows = []
    for f, r in zip(forget, reference, strict=True):
        dtype = torch.promote_types(torch.promote_types(f.dtype, r.dtype), torch.float32)
        wide_f, wide_r = f.to(dtype), r.to(dtype)
        rows += [(wide_f > wide_r * alpha).sum() for alpha in alphas]
    if not rows:
        return torch.zeros(len(forget), len(alphas), dtype=torch.int64)
    return torch.stack(rows).view(len(forget), len(alphas))


def _fake(forget: list[Tensor], reference: list[Tensor], alphas: list[float]) -> Tensor:
    device = forget[0].device if forget else torch.device("cpu")
    return torch.empty(len(forget), len(alphas), dtype=torch.int64, device=device)


implement("selection_curve", _selection_curve)
fake("selection_curve", _fake)
