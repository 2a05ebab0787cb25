"""Putting parameters back as they were before a dampening, bit for bit."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unlearn_fast._library import fake, implement
from unlearn_fast.ops import _checks
from unlearn_fast.ops.dampen.align import Entry
from unlearn_fast.reference.dampen import RUN, dampen_record, dampen_undo_

__all__ = ["UndoLog", "undo_"]


@dataclass
class _Segment:
    """Some parameters, and what a dampening changed in them."""

    names: tuple[str, ...]
    params: list[Tensor]
    record: tuple[Tensor, Tensor, Tensor]  # of dampen_record
    versions: list[int] = field(default_factory=list)  # of the parameters when only dampenings had changed them
    touched: set[str] = field(default_factory=set)  # what something else changed


class UndoLog:
    """What `dampen_(..., undo=...)` changed: the places of the changed values and what they were.

    6 bytes a changed float32, 4 a changed bfloat16. It is written before the parameters are, some of them at a time, so
    that a dampening which is interrupted, by Ctrl-C for one, can be undone with the log that was given to it: `names`
    then tells how far it came. One log may hold several dampenings; they are undone last first. It refers to the
    parameters' memory: a model that was moved or converted since has another, and is not put back.
    """

    def __init__(self) -> None:
        self._segments: list[_Segment] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it can put back, in the order in which they were dampened."""
        return tuple(name for segment in self._segments for name in segment.names)

    @property
    def changed(self) -> int:
        """How many values it holds."""
        return sum(segment.record[1].numel() for segment in self._segments)

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(tensor.nbytes for segment in self._segments for tensor in segment.record)

    def __repr__(self) -> str:
        return f"UndoLog({self.changed:,} values of {len(self.names)} parameters, {self.nbytes / 2**20:.1f} MiB)"

    def record(self, entries: Sequence[Entry], alphas: Sequence[float]) -> None:
        """Adds what a dampening of these parameters, which follows, will change."""
        params = [entry.param for entry in entries]
        recorded = record(entries, alphas)
        self.look()
        self._segments.append(_Segment(tuple(e.name for e in entries), params, recorded))

    def mark(self) -> int:
        """Where it ends now, for `undo_last_`."""
        return len(self._segments)

    def look(self) -> None:
        """Notes what was changed since the last change that was ours."""
        for segment in self._segments:
            rows = zip(segment.names, segment.params, segment.versions, strict=False)
            segment.touched |= {name for name, param, version in rows if _version(param) != version}

    def applied(self) -> None:
        """What changed the parameters since `look` was ours: views of one tensor are changed together."""
        for segment in self._segments:
            segment.versions = [_version(param) for param in segment.params]


def log_for(undo: Any) -> UndoLog | None:
    """The log that the argument `undo` asks for."""
    if not isinstance(undo, (bool, UndoLog)):
        raise TypeError(f"undo is a {type(undo).__name__}: it must be True, False or an UndoLog")
    return undo if isinstance(undo, UndoLog) else UndoLog() if undo else None


def record(entries: Sequence[Entry], alphas: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the elements that these alphas select: how many a run of 65,536, their places in it, their bytes."""
    p, f, r = ([getattr(entry, part) for entry in entries] for part in ("param", "forget", "reference"))
    return torch.ops.unlearn_fast.dampen_record(p, f, r, list(map(float, alphas)))


def undo_(log: UndoLog) -> None:
    """Puts back, bit for bit, what the dampenings in `log` changed, and empties it.

    Args:
        log: from `dampen_(..., undo=True).undo`, or the one that was given as `undo`.

    Raises:
        TypeError: `log` is no `UndoLog`.

    Warns:
        UserWarning: a parameter was changed since, not by a dampening in the log (nor, which does no harm, by another
            that was undone): its dampened values are put back, and no others.
    """
    if not isinstance(log, UndoLog):
        raise TypeError(f"log is a {type(log).__name__}: it must be an UndoLog, which dampen_(..., undo=True) returns")
    undo_last_(log, stacklevel=3)


def undo_last_(log: UndoLog, mark: int = 0, stacklevel: int = 3) -> None:
    """Undoes what was recorded since the log had this mark."""
    log.look()
    undone = log._segments[mark:]
    touched = [name for segment in undone for name in segment.names if name in segment.touched]
    try:
        while len(log._segments) > mark:
            segment = log._segments[-1]
            with torch.no_grad():  # not around all: a decorator would be what the warning points at
                restore_(segment.params, segment.record)
            log._segments.pop()
    finally:
        log.applied()
    if touched:  # told at the end, because a warning may be an error
        warnings.warn(
            f"{touched[0]!r} (of {len(set(touched))} parameters) was changed since it was dampened: only what the"
            " dampening changed is put back",
            stacklevel=stacklevel,
        )


def restore_(params: list[Tensor], recorded: tuple[Tensor, Tensor, Tensor]) -> None:
    """Writes what `record` found in these parameters."""
    torch.ops.unlearn_fast.dampen_undo_(params, *recorded)
    _checks.written(*params)


def _version(param: Tensor) -> int:
    return -1 if param.is_inference() else param._version


def _record_fake(params: list[Tensor], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    device = params[0].device if params else torch.device("cpu")
    runs = sum(-(-p.numel() // RUN) for p in params)
    changed, size = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return (
        torch.empty(runs, dtype=torch.int64, device=device),
        torch.empty(changed, dtype=torch.uint16, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )


implement("dampen_record", dampen_record)
fake("dampen_record", _record_fake)
implement("dampen_undo_", dampen_undo_)
fake("dampen_undo_", lambda *_: None)
