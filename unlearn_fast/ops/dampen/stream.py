"""Dampening on a GPU with importances that lie in the CPU's memory: they pass through, a piece at a time.

While the kernel works on one piece, the next is copied on a stream of its own, through page-locked memory where the
importances are not page-locked themselves. So importances need no room on the GPU but two pieces of each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_fast.ops.dampen.align import Entry

PIECE = 1 << 24  # elements


class Part(NamedTuple):
    """Some elements of one parameter."""

    entry: int
    start: int
    stop: int


def dampen_streamed_(
    entries: Sequence[Entry],
    dampen: Callable[[list[int], list[Tensor], list[Tensor], list[Tensor]], Tensor],
) -> Tensor:  # [len(entries), 4]
    """Dampens parameters on one device whose importances are on the CPU.

    `dampen(indices, params, forget, reference)` does so with elements of the entries at these indices, all on the
    device, and returns their counts.
    """
    device = entries[0].param.device
    params = [entry.param if entry.param.is_contiguous() else entry.param.contiguous() for entry in entries]
    table = torch.zeros(len(entries), 4, dtype=torch.float64, device=device)
    lanes = [Lane(device) for _ in range(2)]
    flat = [[t.reshape(-1) for t in side] for side in zip(*((e.forget, e.reference) for e in entries), strict=True)]
    for turn, piece in enumerate(pieces([p.numel() for p in params], PIECE)):
        importances = [[side[i][start:stop] for i, start, stop in piece] for side in flat]
        indices = [part.entry for part in piece]
        with lanes[turn % 2].bring(importances) as (forget, reference):
            own = [params[i].view(-1)[start:stop] for i, start, stop in piece]
            table.index_add_(0, torch.tensor(indices, device=device), dampen(indices, own, forget, reference))
    for lane in lanes:
        lane.wait()  # the caller may change the importances now
    for entry, param in zip(entries, params, strict=True):
        if param is not entry.param:
            entry.param.copy_(param)
    return table


def pieces(sizes: Sequence[int], limit: int) -> Iterator[list[Part]]:
    """All elements of all parameters, in order, at most `limit` at a time."""
    piece: list[Part] = []
    room = limit
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            piece.append(Part(index, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield piece
                piece, room = [], limit
    if piece:
        yield piece


class Lane:
    """Memory on the device, and page-locked memory, for one piece; taken in turns with another lane's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._buffers: dict[Any, Tensor] = {}
        if self._on_gpu:
            self._copies = torch.cuda.Stream(device)
            self._copied, self._used = torch.cuda.Event(), torch.cuda.Event()

    def bring(self, importances: list[list[Tensor]]) -> AbstractContextManager[list[list[Tensor]]]:
        """The same on the device, for the kernels that are launched while the context lasts."""
        if not self._on_gpu:
            return nullcontext([[t.to(self._device) for t in side] for side in importances])
        return self._on_the_copy_stream(importances)

    def wait(self) -> None:
        """Until what was brought last has been copied."""
        if self._on_gpu:
            self._copied.synchronize()

    @contextmanager
    def _on_the_copy_stream(self, importances: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
        self.wait()  # before the CPU writes to the page-locked memory again
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used)
            brought = [self._bring_side(number, side) for number, side in enumerate(importances)]
            self._copied.record(self._copies)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        yield brought
        self._used.record(current)

    def _bring_side(self, number: int, tensors: list[Tensor]) -> list[Tensor]:
        taken: dict[torch.dtype, int] = {}
        brought = []
        for tensor in tensors:
            start = taken.get(tensor.dtype, 0)
            taken[tensor.dtype] = stop = start + tensor.numel()
            target = self._buffer(number, tensor.dtype, "cuda")[start:stop]
            if not tensor.is_pinned():
                locked = self._buffer(number, tensor.dtype, "cpu")[start:stop]
                tensor = locked.copy_(tensor)
            brought.append(target.copy_(tensor, non_blocking=True))
        return brought

    def _buffer(self, side: int, dtype: torch.dtype, place: str) -> Tensor:
        key = (side, dtype, place)
        if key not in self._buffers:
            where: dict[str, Any] = {"device": self._device} if place == "cuda" else {"pin_memory": True}
            self._buffers[key] = torch.empty(PIECE, dtype=dtype, **where)
        return self._buffers[key]
