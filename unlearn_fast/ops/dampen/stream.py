"""Dampening on a GPU with importances that lie in the CPU's memory: they pass through, a piece at a time.

While the kernel works on one piece, the next is copied on a stream of its own, through page-locked memory where the
importances are not page-locked themselves. So importances need no room on the GPU but two pieces of each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

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
    flat = [[t.reshape(-1) for t in side] for side in zip(*((e.forget, e.reference) for e in entries), strict=True)]
    sizes = [p.numel() for p in params]
    parted = list(pieces(sizes, PIECE))
    lanes = [Lane(device, min(PIECE, sum(sizes))) for _ in range(2)]
    tables = []
    try:
        for turn, piece in enumerate(parted):
            importances = [[side[i][start:stop] for i, start, stop in piece] for side in flat]
            with lanes[turn % 2].bring(importances) as (forget, reference):
                own = [params[i].view(-1)[start:stop] for i, start, stop in piece]
                tables.append(dampen([part.entry for part in piece], own, forget, reference))
    finally:
        for lane in lanes:
            lane.wait()  # the caller may change the importances now, and others use the lane's memory
    for entry, param in zip(entries, params, strict=True):
        if param is not entry.param:
            entry.param.copy_(param)
    table = torch.zeros(len(entries), 4, dtype=torch.float64, device=device)
    if tables:  # one index for all: to send one to the device waits for its kernels
        index = torch.tensor([part.entry for piece in parted for part in piece], device=device)
        table.index_put_((index,), torch.cat(tables), accumulate=True)  # on GPUs in order, unlike index_add_
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

    def __init__(self, device: torch.device, elements: int) -> None:
        self._device, self._elements = device, elements
        self._on_gpu = device.type == "cuda"
        self._places: dict[tuple[int, torch.dtype], Tensor] = {}  # on the device
        self._locked: dict[tuple[int, torch.dtype], Tensor] = {}  # on the CPU
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
        current = torch.cuda.current_stream(self._device)
        for number, side in enumerate(importances):
            self._make_places(number, {t.dtype for t in side}, current)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used)
            brought = [self._bring_side(number, side) for number, side in enumerate(importances)]
            self._copied.record(self._copies)
        current.wait_event(self._copied)
        yield brought
        self._used.record(current)

    def _make_places(self, side: int, dtypes: set[torch.dtype], current: torch.cuda.Stream) -> None:
        """Outside of the copy stream: memory that is freed goes back to the stream that it was taken in, and kernels of
        the current one read it last. For the same reason kernels launched before may still use what is taken."""
        for key in {(side, dtype) for dtype in dtypes} - self._places.keys():
            self._places[key] = torch.empty(self._elements, dtype=key[1], device=self._device)
            self._used.record(current)

    def _bring_side(self, number: int, tensors: list[Tensor]) -> list[Tensor]:
        taken: dict[torch.dtype, int] = {}
        brought = []
        for tensor in tensors:
            key, start = (number, tensor.dtype), taken.get(tensor.dtype, 0)
            taken[tensor.dtype] = stop = start + tensor.numel()
            if not tensor.is_pinned():
                if key not in self._locked:
                    self._locked[key] = torch.empty(self._elements, dtype=tensor.dtype, pin_memory=True)
                tensor = self._locked[key][start:stop].copy_(tensor)
            brought.append(self._places[key][start:stop].copy_(tensor, non_blocking=True))
        return brought
