"""What is written until it is complete, beside the output, and the journal from which a restart goes on.

The output OUT is made in the folder `.OUT.unlearn_fast`: `data`, the file or the directory that becomes OUT in one
rename, and `journal.json`, which tells up to where the data are on the disk for certain.
"""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from unlearn_fast._files import sync

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


Piece = tuple[int, list[float]]  # a row of the report, and what is added to it
Done = tuple[int, list[Piece]]  # the end of a block, and its pieces


class Progress(NamedTuple):
    """All jobs in front of `job` are done, and this one up to `position`; `stats` is the report so far."""

    job: int
    position: int
    stats: list[list[float]]

    def plus(self, done: list[Done]) -> "Progress":
        """With further blocks, in their order. Those that are counted already change nothing, so that an interruption
        at any moment leaves the counts right."""
        stats, position = list(self.stats), self.position
        for end, pieces in done:
            if end > position:
                for row, counts in pieces:
                    stats[row] = [a + b for a, b in zip(stats[row], counts, strict=True)]
                position = end
        return Progress(self.job, position, stats)


def folder_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.unlearn_fast")


def sync_data(file: int) -> None:
    getattr(os, "fdatasync", os.fsync)(file)  # macOS has only the second


class Workspace:
    """Holds the folder, alone: a second process that wants the same output is refused."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.out, self.fingerprint = out, fingerprint
        self.folder = folder_of(out)
        self.data, self.journal = self.folder / "data", self.folder / "journal.json"
        self.folder.mkdir(exist_ok=True)
        self._folder = os.open(self.folder, os.O_RDONLY)
        try:
            self._lock()
        except BaseException:
            os.close(self._folder)
            raise

    def _lock(self) -> None:
        import fcntl  # which only POSIX systems have

        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(self._folder).st_ino == os.stat(self.folder).st_ino  # else another run has just finished
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held or os.path.lexists(self.out):
            raise FileExistsError(f"out: another run is writing {str(self.out)!r}, or has just done so")

    def close(self) -> None:
        os.close(self._folder)  # which ends the lock

    def load(self, sizes: list[int], paths: list[Path]) -> Progress | None:
        """Where an earlier run of the same command stopped. Without one, the folder is emptied."""
        progress = self._load(sizes, paths)
        if progress is None:
            self.journal.unlink(missing_ok=True)
            if self.data.is_dir():
                shutil.rmtree(self.data)
            self.data.unlink(missing_ok=True)
        return progress

    def _load(self, sizes: list[int], paths: list[Path]) -> Progress | None:
        try:
            record = json.loads(self.journal.read_bytes())
            if record["fingerprint"] != self.fingerprint:
                return None
            progress = Progress(record["job"], record["position"], record["stats"])
            written = [os.stat(path).st_size for path in paths[: progress.job + (progress.position > 0)]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        done, begun = written[: progress.job], written[progress.job :]
        if done != sizes[: progress.job] or any(size < progress.position for size in begun):
            return None
        return progress

    def save(self, progress: Progress) -> None:
        """Only for data that are on the disk: a journal must not know of more than there is after a power cut."""
        temporary = self.journal.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump({"fingerprint": self.fingerprint, **progress._asdict()}, file)
            file.flush()
            sync_data(file.fileno())
        temporary.replace(self.journal)
        os.fsync(self._folder)

    def publish(self) -> None:
        """Gives the data their name. They and the journal are complete, and on the disk."""
        if os.path.lexists(self.out):
            raise FileExistsError(f"out: {str(self.out)!r} has appeared: move it away, and run the same command again")
        for folder in (self.data, *self.data.rglob("*")):
            if folder.is_dir():
                sync(folder)
        self.data.rename(self.out)
        sync(self.out.parent)
        with suppress(OSError):  # the output is there, whatever becomes of the rest
            shutil.rmtree(self.folder)


def sweep(out: Path) -> None:
    """A run that was killed right after it gave the output its name has left its journal."""
    folder = folder_of(out)
    if os.path.lexists(out) and folder.is_dir() and not os.path.lexists(folder / "data"):
        shutil.rmtree(folder, ignore_errors=True)


def held_bytes(out: Path) -> int:
    """What an earlier run has written, which needs no room again: a restart goes on there, or empties it first."""
    data = folder_of(out) / "data"
    files = [data] if data.is_file() else [path for path in data.rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files)
