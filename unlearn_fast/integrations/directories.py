"""Model directories that appear under their name only when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unlearn_fast._files import WEIGHTS, sync

# What an unlearned model must not bring along: other copies of its weights, states of its training, and data.
LEFT_BEHIND = {*WEIGHTS, ".jsonl", ".parquet", ".arrow", ".csv", ".pyc", ".tmp", ".log"}


def check_new_directory(out: Path, model: Path) -> None:
    """Raises where `out` cannot become a new directory outside of `model`."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"out {str(out)!r} exists: it must be a new directory")
    if model.resolve() in out.resolve().parents:
        raise ValueError(f"out {str(out)!r} lies inside the model directory {str(model)!r}: it must lie elsewhere")
    check_writable(out.parent, "out")


def check_writable(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: the directory {str(folder)!r} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: nothing can be written to the directory {str(folder)!r}")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write to, which becomes `out` at the end, and leaves nothing behind on errors.

    Everything is on the disk before it has the name: whatever happens, what lies under it is complete.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if out.exists():  # an empty directory would be replaced
            raise FileExistsError(f"out {str(out)!r} exists: it appeared in the meantime")
        temporary.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_other_files(model: Path, out: Path) -> None:
    """The tokenizer, configs, code and texts of a model directory, byte for byte; no weights, and nothing hidden."""
    for path in sorted(model.iterdir()):
        weights = path.suffix in LEFT_BEHIND or path.name.endswith(".index.json")
        if path.name.startswith(".") or path.name == "__pycache__" or path.name.startswith("checkpoint-") or weights:
            continue
        if path.is_dir():
            copy_other_files(path, out / path.name)
        elif path.is_file():
            out.mkdir(exist_ok=True)
            shutil.copy(path, out / path.name)  # what a link leads to: in a download cache, all files are links
