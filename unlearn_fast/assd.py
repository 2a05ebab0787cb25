"""ASSD: Selective Synaptic Dampening that chooses its alpha itself, from the share of the data to be forgotten."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from unlearn_fast._report import DampenReport
from unlearn_fast.fisher import Importance
from unlearn_fast.fisher.per_example import Losses
from unlearn_fast.ops import _checks
from unlearn_fast.ops.alpha_for_percentile import alpha_for_percentile
from unlearn_fast.ops.dampen import UndoLog, check_settings, dampen_
from unlearn_fast.ops.dampen.undo import log_for
from unlearn_fast.ssd import importances


def assd_(
    model: nn.Module,
    *,
    forget: Importance | Iterable[Any],
    reference: Importance | Iterable[Any],
    losses: Losses | None = None,
    share: float | None = None,
    lam: float = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
    undo: bool | UndoLog = False,
    mode: str = "per_example",
    progress: bool = True,
) -> DampenReport:
    """Adaptive SSD, in place and without parameters to tune: `ssd_` whose alpha is a percentile of f / r.

    `alpha = percentile(f / r, 100 - ln(1 + 100 * share))` over the finite ratios of all parameters, with `share` the
    examples to be forgotten over all training examples; it is in the report's `alpha`.

    Args:
        model, losses, exponent, cap, floor, undo, mode, progress: as for `ssd_`.
        forget, reference: batches, or ready importances, of the forgotten and of the RETAINED examples.
        share: of the training examples, those to be forgotten, between 0 and 1; by default that of the examples which
            were measured, forget / (forget + reference).
        lam: dampening constant. Published: 1.

    Returns:
        A `DampenReport`.

    Raises:
        TypeError, ValueError: an argument does not fit, or no ratio is finite; the model is then unchanged.

    Warns:
        UserWarning: an importance belongs to other weights, or nothing was selected.

    Source: Schoepf, Foster, Brintrup, "Parameter-tuning-free data entry error unlearning with adaptive selective
    synaptic dampening", 2024.
    """
    check_settings(0.0, lam, exponent, cap, floor)
    log_for(undo)
    if share is not None:
        _checks.number("share", share, 0, 1)
    f, r = importances(model, forget, reference, losses, mode, progress)
    share = f.examples / (f.examples + r.examples) if share is None else share
    alpha = alpha_for_percentile(f, r, percentile(share))
    report = dampen_(model, f, r, alpha=max(alpha, 0.0), lam=lam, exponent=exponent, cap=cap, floor=floor, undo=undo)
    if report.total.selected == 0:
        warnings.warn(f"nothing was selected: no ratio f / r is above the percentile {alpha:.6g}", stacklevel=2)
    return report


def percentile(share: float) -> float:
    """Of the ratios f / r, the percentile above which parameters are dampened."""
    return 100 - math.log1p(100 * share)
