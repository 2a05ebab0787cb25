"""Putting parameters back as they were before a dampening, bit for bit."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unlearn_fast._library import fake, implement
from unlearn_fast.ops import _checks
from unlearn_fast.ops.dampen.align import Entry
from unlearn_fast.reference.dampen import dampen_record, dampen_undo_

__all__ = ["UndoLog", "undo_"]


@dataclass
class _Segment:
    """Some parameters, and what a dampening changed in them."""

    names: tuple[str, ...]
    params: list[Tensor]
    record: tuple[Tensor, Tensor, Tensor]  # of dampen_record
    versions: list[int] = field(default_factory=list)  # of the parameters right after the change


class UndoLog:
    """What `dampen_(..., undo=...)` changed: the places of the changed values and what they were.

    6 bytes a changed float32, 4 a changed bfloat16. It is written before the parameters are, some of them at a time, so
    that a dampening which is interrupted, by Ctrl-C for one, can be undone with the log that was given to it: `names`
    then tells how far it came. One log may hold several dampenings; they are undone last first.
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
        self._segments.append(_Segment(tuple(e.name for e in entries), params, record(entries, alphas)))

    def extend(self, other: "UndoLog") -> None:
        """Takes over what another log holds, as the last."""
        self._segments += other._segments
        other._segments = []

    def applied(self) -> None:
        """The dampening that was recorded last is done."""
        self._segments[-1].versions = [_version(param) for param in self._segments[-1].params]


def record(entries: Sequence[Entry], alphas: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the elements that these alphas select: how many a run of 65,536, their places in it, their bytes."""
    p, f, r = ([getattr(entry, part) for entry in entries] for part in ("param", "forget", "reference"))
    return torch.ops.unlearn_fast.dampen_record(p, f, r, list(map(float, alphas)))


@torch.no_grad()
def undo_(log: UndoLog) -> None:
    """Puts back, bit for bit, what the dampenings in `log` changed, and empties it.

    Args:
        log: from `dampen_(..., undo=True).undo`, or the one that was given as `undo`.

    Raises:
        TypeError: `log` is no `UndoLog`.

    Warns:
        UserWarning: a parameter was changed since: its dampened values are put back, and no others.
    """
    if not isinstance(log, UndoLog):
        raise TypeError(f"log is a {type(log).__name__}: it must be an UndoLog, which dampen_(..., undo=True) returns")
    touched = [
        name
        for segment in log._segments
        for name, param, version in zip(segment.names, segment.params, segment.versions, strict=False)
        if _version(param) != version
    ]
    # Several dampenings of one parameter change it between them.
    if touched and len(set(log.names)) == len(log.names):
        warnings.warn(
            f"{touched[0]!r} (of {len(touched)} parameters) was changed since it was dampened: only what the dampening"
            " changed is put back",
            stacklevel=2,
        )
    while log._segments:
        segment = log._segments[-1]
        restore_(segment.params, segment.record)
        log._segments.pop()


def restore_(params: list[Tensor], recorded: tuple[Tensor, Tensor, Tensor]) -> None:
    """Writes what `record` found in these parameters."""
    torch.ops.unlearn_fast.dampen_undo_(params, *recorded)
    _checks.written(*params)


def _version(param: Tensor) -> int:
    return -1 if param.is_inference() else param._version


def _record_fake(params: list[Tensor], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    device = params[0].device if params else torch.device("cpu")
    runs = sum(-(-p.numel() // 65536) for p in params)
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
