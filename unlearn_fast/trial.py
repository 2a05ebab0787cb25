"""A dampening on trial: the model is as before when the block ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unlearn_fast._report import DampenReport
from unlearn_fast.ops.dampen import Importances, Parameters, UndoLog, dampen_
from unlearn_fast.ops.dampen.undo import undo_last_


@contextmanager
def trial(params: Parameters, forget: Importances, reference: Importances, **settings: Any) -> Iterator[DampenReport]:
    """Dampens for the length of a `with` block, and puts everything back, bit for bit, however the block ends.

        with trial(model, forget, reference, alpha=10.0) as report:
            accuracy = evaluate(model)

    Args:
        params, forget, reference, settings: as for `dampen_`, without `undo`.

    Yields:
        The `DampenReport`.

    Raises:
        TypeError, ValueError: as `dampen_`; nothing is changed then.

    Warns:
        UserWarning: the block changed a parameter itself, if only by another trial: the dampened values are put back,
            and no others.
    """
    if "undo" in settings:
        raise TypeError("undo is not for trial, which always undoes: leave it out")
    log = UndoLog()
    try:
        yield dampen_(params, forget, reference, undo=log, **settings)
    finally:
        undo_last_(log, stacklevel=4)
