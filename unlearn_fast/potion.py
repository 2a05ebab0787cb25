"""Potion: dampening that grows until the forget set is forgotten."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from unlearn_fast._report import DampenReport
from unlearn_fast.assd import percentile
from unlearn_fast.fisher import Importance
from unlearn_fast.fisher.per_example import Losses
from unlearn_fast.ops import _checks
from unlearn_fast.ops.alpha_for_percentile import alpha_for_percentile
from unlearn_fast.ops.dampen import UndoLog, check_settings, dampen_
from unlearn_fast.ops.dampen.undo import log_for, undo_last_
from unlearn_fast.ssd import importances

START, GROWTH = 25, 1.1  # published: the first share is a 25th of the true one, each further one a tenth larger


def potion_(
    model: nn.Module,
    *,
    forget: Importance | Iterable[Any],
    reference: Importance | Iterable[Any],
    forget_score: Callable[[nn.Module], float],
    below: float,
    losses: Losses | None = None,
    share: float | None = None,
    tries: int = 100,
    lam: float = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
    undo: bool | UndoLog = False,
    mode: str = "per_example",
    progress: bool = True,
) -> DampenReport:
    """Dampens, in place, just as much as it takes: with growing shares, until `forget_score(model) < below`.

    Try k = 0, 1, ... is that of `assd_` with `share / 25 * 1.1^k`. The importances are measured once, all alphas found
    in one go, and each try starts from the original weights, of which no copy is made.

    Args:
        model, losses, lam, exponent, cap, floor, undo, mode, progress: as for `ssd_`.
        forget, reference: batches, or ready importances, of the forgotten and of the RETAINED examples.
        forget_score: what is to fall, of the dampened model: its accuracy on the forget set, for instance. Must not
            change the parameters.
        below: where the search stops. In the paper, accuracy on poisoned data, and a cut that depends on its estimate.
        share: of the training examples, those to be forgotten, between 0 and 1; by default that of the examples which
            were measured, forget / (forget + reference).
        tries: how many at most; the share never grows beyond 1.

    Returns:
        The `DampenReport` of the try that was enough; its `alpha` tells how far it went.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: no try was enough. The model is then as it was, as it is after any other error.

    Source: Schoepf, Foster, Brintrup, "Potion: Towards Poison Unlearning", 2024.
    """
    check_settings(0.0, lam, exponent, cap, floor)
    wanted = log_for(undo)
    log = UndoLog() if wanted is None else wanted
    mark = log.mark()
    _checks.number("below", below, -math.inf)
    if not callable(forget_score):
        raise TypeError(f"forget_score is a {type(forget_score).__name__}: it must be a function of the model")
    if isinstance(tries, bool) or not isinstance(tries, int) or tries < 1:
        raise ValueError(f"tries is {tries!r}: it must be a whole number, at least 1")
    if share is not None:
        _checks.number("share", share, 0, 1)
    f, r = importances(model, forget, reference, losses, mode, progress)
    share = f.examples / (f.examples + r.examples) if share is None else share
    shares = [min(1.0, share / START * GROWTH**k) for k in range(tries)]
    shares = shares[: shares.index(1.0) + 1] if 1.0 in shares else shares
    settings: dict[str, Any] = {"lam": lam, "exponent": exponent, "cap": cap, "floor": floor}
    for alpha in _shown(alpha_for_percentile(f, r, list(map(percentile, shares))), progress):
        try:
            report = dampen_(model, f, r, alpha=max(alpha, 0.0), undo=log, **settings)
            score = _number(forget_score(model))
        except BaseException:
            undo_last_(log, mark)
            raise
        if score < below:
            return report if wanted is not None else dataclasses.replace(report, undo=None)
        undo_last_(log, mark)
    raise RuntimeError(
        f"forget_score is still {score:.4g}, not below {below:g}, after {len(shares)} tries, the last with share"
        f" {shares[-1]:.4g}: the model is as it was"
    )


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(f"forget_score returned {score!r}: it must be a number") from error


def _shown(alphas: list[float], progress: bool) -> Iterable[float]:
    if not progress:
        return alphas
    from tqdm.auto import tqdm

    return tqdm(alphas, desc="potion", unit="try", leave=False)
