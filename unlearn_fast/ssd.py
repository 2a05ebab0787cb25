"""Selective Synaptic Dampening: importance of both sets, dampening, report."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from unlearn_fast._report import DampenReport
from unlearn_fast.fisher import Importance, diagonal_fisher
from unlearn_fast.fisher.importance import model_fingerprint
from unlearn_fast.fisher.per_example import Losses
from unlearn_fast.ops.dampen import Setting, UndoLog, check_settings, dampen_
from unlearn_fast.ops.dampen.settings import by_parameter
from unlearn_fast.ops.dampen.undo import log_for


def ssd_(
    model: nn.Module,
    *,
    forget: Importance | Iterable[Any],
    reference: Importance | Iterable[Any],
    losses: Losses | None = None,
    alpha: Setting,
    lam: Setting = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
    undo: bool | UndoLog = False,
    mode: str = "per_example",
    progress: bool = True,
) -> DampenReport:
    """Makes a model forget, in place, without training: `p *= min((lam * r / f)^exponent, cap)` where `f > alpha * r`.

    f and r are the diagonal Fisher information of the forget and of the reference set.

    Args:
        model: any module; its parameters change, nothing else does.
        forget, reference: batches (see `diagonal_fisher`), or a ready `Importance`. The reference set is the full
            training set (released code) or the retained set only (most later work).
        losses: `losses(model, batch) -> [B]`; not needed where both importances are ready.
        alpha: selection threshold; lam: dampening constant. Published: 10 and 1 for ResNet-18 on CIFAR. One number, or
            one for each parameter or range of layers, see `dampen_`.
        exponent, cap, floor, undo: see `dampen_`.
        mode: "per_example" (the definition) or "batch" (the released approximation), see `diagonal_fisher`.
        progress: show progress bars.

    Returns:
        A `DampenReport`.

    Raises:
        TypeError, ValueError: an argument does not fit; the model is then unchanged.

    Warns:
        UserWarning: nothing was selected; or an importance belongs to other weights.

    Source: Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024.
    """
    check_settings(alpha, lam, exponent, cap, floor)
    log_for(undo)
    names = [name for name, _ in model.named_parameters()]
    for argument, setting in (("alpha", alpha), ("lam", lam)):  # before hours of measuring
        by_parameter(argument, setting, names)
    f, r = importances(model, forget, reference, losses, mode, progress)
    report = dampen_(model, f, r, alpha=alpha, lam=lam, exponent=exponent, cap=cap, floor=floor, undo=undo)
    if report.total.selected == 0:
        warnings.warn(_nothing_selected(f, r, alpha), stacklevel=2)
    return report


def importances(
    model: nn.Module,
    forget: Importance | Iterable[Any],
    reference: Importance | Iterable[Any],
    losses: Losses | None,
    mode: str,
    progress: bool,
) -> tuple[Importance, Importance]:
    """Of both sets: those that are given, and those that are still to be measured."""
    found = []
    for name, given in (("forget", forget), ("reference", reference)):
        if isinstance(given, Importance):
            if given.fingerprint != model_fingerprint(model):
                warnings.warn(
                    f"{name}: these importances were measured on other weights than the model's", stacklevel=3
                )
            found.append(given)
        elif losses is None:
            raise TypeError(f"losses is missing: it must be given where {name} is batches")
        else:
            found.append(diagonal_fisher(model, given, losses, mode=mode, progress=progress))
    f, r = found
    if f.mode != r.mode:
        raise ValueError(f"forget has mode {f.mode!r} and reference {r.mode!r}: both must be measured in one mode")
    return f, r


def _nothing_selected(f: Importance, r: Importance, alpha: Setting) -> str:
    if not isinstance(alpha, (int, float)):
        return "nothing was selected: no forget importance is above its alpha times its reference importance"
    share = f.examples / r.examples
    if alpha > 0 and share >= 1 / alpha:
        return (
            f"nothing was selected: where the reference set includes the forget set, nothing can be, because the forget"
            f" set is {share:.4g} of it ({f.examples} of {r.examples} examples) and 1 / alpha is {1 / alpha:.4g}:"
            f" alpha must be below {1 / share:.4g}, or the reference the retained set only"
        )
    return f"nothing was selected: no forget importance is above alpha = {alpha:g} times its reference importance"
