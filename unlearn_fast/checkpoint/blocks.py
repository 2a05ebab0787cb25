"""Files in blocks, and what is dampened in each.

Blocks lie on a grid of the file, whatever tensors it holds, so that a thousand small tensors cost one read and one
write, and everything without importances is copied with them. A few threads take block after block: reading, the kernel
and writing release Python's lock, and overlap; the writes keep their order.
"""

import itertools
import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from unlearn_fast.checkpoint.journal import Piece
from unlearn_fast.checkpoint.plan import Edit, Job, Plan, Settings
from unlearn_fast.checkpoint.safetensors_file import FLOATING

BLOCK = 4 << 20  # bytes of a file at a time: less, and handing them around shows
LEAST_BLOCK = 1 << 16
WRITE = 1 << 15  # a longer write asks the system for longer runs of free memory, whose search can take longer than it
RUN = 1 << 16  # elements that the kernel takes in the calling thread: ours are enough of them
WIDEST = max(dtype.itemsize for dtype in FLOATING.values())

# Counted within `memory`, beyond the blocks: stacks and allocators of the threads and code that had not run before
# (11 MiB were seen), and what a byte of header becomes (5 were seen).
FIXED_BYTES = 14 << 20
BYTES_OF_A_HEADER_BYTE = 8
BUFFERS = 4  # of a worker, each as large as a block: importances as stored, as computed with, what is not aligned; it


class Blocks(NamedTuple):
    bytes: int
    workers: int


def blocks_within(memory: int, plan: Plan) -> Blocks:
    """How large blocks may be, and how many threads take them; ValueError where not even the smallest fit."""
    workers = min(max(torch.get_num_threads(), 2), 4)
    fixed = FIXED_BYTES + BYTES_OF_A_HEADER_BYTE * plan.header_bytes
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory is {memory!r}: it must be a number of bytes")
    least = fixed + BUFFERS * LEAST_BLOCK * workers
    if memory < least:
        raise ValueError(f"memory is {memory:,} bytes: it must be at least {least:,} for these files")
    size = (memory - fixed) // (BUFFERS * workers) // LEAST_BLOCK * LEAST_BLOCK
    return Blocks(min(BLOCK, size), workers)


class FileCopy:
    """One file, read, dampened and written by several threads."""

    def __init__(
        self, job: Job, files: ExitStack, target: int | None, block: int, settings: Settings, written: int
    ) -> None:
        self.edits, self.size, self.settings, self.target = job.edits, block, settings, target
        self.begins = [edit.begin for edit in job.edits]
        self.source = open_file(files, job.source)
        sources = {s.path for edit in job.edits for s in (edit.forget, edit.reference)} - {None}
        self.importances = {path: open_file(files, path) for path in sources if path is not None}
        self.memory = threading.local()
        self.turn = threading.Condition()  # blocks are written in their order, one at a time
        self.written, self.failed = written, sys.maxsize  # up to where; begin of the first block that failed

    def blocks(self, begin: int, size: int) -> Iterator[tuple[int, int]]:
        while begin < size:
            end = self._whole(min((begin // self.size + 1) * self.size, size))
            if end == begin:  # an element lies across the border of a block
                end = self._whole(min(end + self.size, size))
            yield begin, end
            begin = end

    def _whole(self, at: int) -> int:
        """The last position up to `at` that does not split an element."""
        i = bisect_right(self.begins, at) - 1
        if i < 0 or at >= self.edits[i].end:
            return at
        return at - (at - self.edits[i].begin) % self.edits[i].dtype.itemsize

    def block(self, begin: int, end: int) -> list[Piece]:
        try:
            return self._block(begin, end)
        except BaseException:
            with self.turn:
                self.failed = min(self.failed, begin)
                self.turn.notify_all()
            raise

    def _block(self, begin: int, end: int) -> list[Piece]:
        block, importances = self._buffers()
        block = block[: end - begin]
        _read(self.source, block, begin)
        pieces: list[Piece] = []
        first = max(bisect_right(self.begins, begin) - 1, 0)
        for edit in itertools.islice(self.edits, first, None):
            if edit.begin >= end:
                break
            length = self.size // (2 * WIDEST) * edit.dtype.itemsize
            for at in range(max(edit.begin, begin), min(edit.end, end), length):
                part = block[at - begin : min(at + length, edit.end, end) - begin]
                pieces.append((edit.row, self._dampen(edit, at, part, importances)))
        if self.target is not None:
            with self.turn:
                self.turn.wait_for(lambda: self.written == begin or self.failed < begin)
                if self.failed < begin:
                    raise CancelledError
            _write(self.target, block, begin)
            with self.turn:
                self.written = end
                self.turn.notify_all()
        return pieces

    def _buffers(self) -> tuple[memoryview, list[memoryview]]:
        """Of this thread."""
        if not hasattr(self.memory, "buffers"):
            half = self.size // 2
            self.memory.buffers = (
                memoryview(bytearray(self.size + WIDEST)),
                [memoryview(bytearray(half)) for _ in range(2)],
            )
        return self.memory.buffers

    def _dampen(self, edit: Edit, at: int, part: memoryview, buffers: list[memoryview]) -> list[float]:
        """Dampens the elements from byte `at` of the file on, which `part` holds; returns their counts."""
        n = len(part) // edit.dtype.itemsize
        first = (at - edit.begin) // edit.dtype.itemsize
        tensors = []
        for source, buffer in zip((edit.forget, edit.reference), buffers, strict=True):
            if source.path is None:
                tensors.append(torch.zeros(n))
                continue
            values = buffer[: n * source.dtype.itemsize]
            _read(self.importances[source.path], values, source.begin + first * source.dtype.itemsize)
            tensors.append(torch.frombuffer(values, dtype=source.dtype))
        p = torch.frombuffer(part, dtype=edit.dtype)
        aligned = p if p.data_ptr() % p.itemsize == 0 else p.clone()
        alpha, lam, *rest = self.settings
        row = torch.zeros(4, dtype=torch.float64)
        for run in zip(*(t.split(RUN) for t in (aligned, *tensors)), strict=True):
            row += torch.ops.unlearn_fast.dampen_(*([t] for t in run), [alpha], [lam], *rest)[0]
        if aligned is not p:
            p.copy_(aligned)
        counts: list[float] = row.tolist()
        return counts


def open_file(files: ExitStack, path: Path, flags: int = os.O_RDONLY) -> int:
    file = os.open(path, flags, 0o666)
    files.callback(os.close, file)
    if flags == os.O_RDONLY and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file


def _read(file: int, buffer: memoryview, position: int) -> None:
    while len(buffer):
        n = os.preadv(file, [buffer], position)
        if n == 0:
            raise OSError("an input became shorter while it was read: leave the inputs alone, and run the same again")
        buffer, position = buffer[n:], position + n


def _write(file: int, buffer: memoryview, position: int) -> None:
    while len(buffer):
        n = os.pwrite(file, buffer[:WRITE], position)
        buffer, position = buffer[n:], position + n
