"""One pass over all files: blocks to the threads, their counts to the report, and what is done to the journal."""

import errno
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor

from unlearn_fast.checkpoint.blocks import Blocks, FileCopy, open_file
from unlearn_fast.checkpoint.journal import FULL, Done, Progress, Workspace, sync_data
from unlearn_fast.checkpoint.plan import Job, Plan

JOURNAL = 512 << 20  # bytes between two entries of the journal


class Stream:
    """One pass over all jobs of a plan. Without a workspace nothing is written."""

    def __init__(self, plan: Plan, blocks: Blocks, workspace: Workspace | None, show_progress: bool) -> None:
        self.plan, self.blocks, self.workspace = plan, blocks, workspace
        self.show_progress = show_progress
        self.progress = Progress(0, 0, [[0.0] * 4 for _ in plan.names])
        self.unvouched = 0  # bytes since the last entry of the journal

    def run(self) -> Tensor:
        """Returns the counts of all tensors, [P, 4]."""
        from tqdm.auto import tqdm

        jobs = self.plan.jobs
        if self.workspace is not None:
            earlier = self.workspace.load([job.size for job in jobs], [self._target(job) for job in jobs])
            self.progress = earlier or self.progress
        done = sum(job.size for job in jobs[: self.progress.job]) + self.progress.position
        try:
            with (
                ThreadPoolExecutor(self.blocks.workers, "dampen") as self.workers,
                ThreadPoolExecutor(1, "journal") as self.journal,
                tqdm(
                    desc="dampen", total=self.plan.size, initial=done, unit="B", unit_scale=True, unit_divisor=1024,
                    leave=False, file=sys.stderr, disable=None if self.show_progress else True,
                ) as self.bar,
            ):  # fmt: skip
                for job in jobs[self.progress.job :]:
                    self._do(job)
                    self.progress = Progress(self.progress.job + 1, 0, self.progress.stats)
                    if self.workspace is not None and self.unvouched >= JOURNAL:
                        self.unvouched = 0
                        self._tell(self.progress)
                if self.workspace is not None:
                    self._tell(self.progress)
        except OSError as error:
            if self.workspace is not None and error.errno in FULL:
                raise self._full(self.workspace, error) from error
            raise
        return torch.tensor(self.progress.stats, dtype=torch.float64).reshape(-1, 4)

    def _target(self, job: Job) -> Path:
        assert self.workspace is not None
        return self.workspace.data / job.relative

    def _do(self, job: Job) -> None:
        with ExitStack() as files:
            target = None
            if self.workspace is not None:
                path = self._target(job)
                path.parent.mkdir(parents=True, exist_ok=True)
                target = open_file(files, path, os.O_WRONLY | os.O_CREAT)
            done: list[Done] = []
            try:
                if target is not None and os.fstat(target).st_size > self.progress.position:
                    os.ftruncate(target, self.progress.position)
                copy = FileCopy(job, files, target, self.blocks.bytes, self.plan.settings, self.progress.position)
                self._stream(job, copy, target, done)
            except BaseException:
                if target is not None:
                    self.progress = self.progress.plus(done)
                    self._keep(target)
                raise

    def _stream(self, job: Job, copy: FileCopy, target: int | None, done: list[Done]) -> None:
        vouched: Future[None] | None = None
        blocks = copy.blocks(self.progress.position, job.size)
        try:
            while segment := list(itertools.islice(blocks, max(1, JOURNAL // self.blocks.bytes))):
                for end, pieces in self._edited(copy, segment):
                    done.append((end, pieces))
                self.progress = self.progress.plus(done)
                done.clear()
                if target is not None and self.progress.position < job.size:
                    if vouched is not None:
                        vouched.result()
                    self.unvouched = 0
                    vouched = self.journal.submit(self._vouch, target, self.progress)
        finally:
            if vouched is not None:
                vouched.result()
        if target is not None:
            sync_data(target)

    def _edited(self, copy: FileCopy, segment: list[tuple[int, int]]) -> Iterator[Done]:
        """The blocks of a segment in their order, as they become ready. In the end no thread is at work on one."""
        futures = [self.workers.submit(copy.block, begin, end) for begin, end in segment]
        try:
            for (begin, end), future in zip(segment, futures, strict=True):
                yield end, future.result()
                self.unvouched += end - begin
                self.bar.update(end - begin)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _vouch(self, target: int, progress: Progress) -> None:
        """In a thread of its own, while the next blocks are written."""
        sync_data(target)
        self._tell(progress)

    def _tell(self, progress: Progress) -> None:
        assert self.workspace is not None
        self.workspace.save(progress)

    def _keep(self, target: int) -> None:
        """After an error: notes what is done, as far as that goes."""
        with suppress(OSError):
            os.ftruncate(target, self.progress.position)  # a full disk may need this room for the journal
            sync_data(target)
            self._tell(self.progress)

    def _full(self, workspace: Workspace, error: OSError) -> OSError:
        return OSError(
            errno.ENOSPC,
            f"out: {str(workspace.folder)!r} cannot grow ({error.strerror}); the model is as it was, and what was"
            " done stays there: make room, and run the same command again, which goes on where this one stopped",
        )
