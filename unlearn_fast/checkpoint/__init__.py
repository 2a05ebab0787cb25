"""Dampening of checkpoints on disk, in bounded memory, that a kill does not damage and only interrupts."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from unlearn_fast._library import warn_if_slow
from unlearn_fast._report import DampenReport
from unlearn_fast.checkpoint import journal
from unlearn_fast.checkpoint.blocks import blocks_within
from unlearn_fast.checkpoint.plan import Plan, Settings, check_out, make_plan
from unlearn_fast.checkpoint.stream import Stream

__all__ = ["CheckpointReport", "dampen"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CheckpointReport(DampenReport):
    """A `DampenReport`; `files_left_out` are those that were not copied because they hold weights, undampened."""

    files_left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = super().__str__()
        if self.files_left_out:
            text += f"; left out, as they are not part of the model that was dampened: {', '.join(self.files_left_out)}"
        return text


def dampen(
    model_path: PathLike,
    forget_path: PathLike,
    reference_path: PathLike,
    out: PathLike | None,
    *,
    alpha: float,
    lam: float = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
    memory: int = 512 << 20,
    dry_run: bool = False,
    progress: bool = True,
) -> CheckpointReport:
    """Selective synaptic dampening of a checkpoint: `p *= min((lam * r / f)^exponent, cap)` where `f > alpha * r`.

    The result has the bits of `dampen_` in memory; everything else (header, metadata, order, tensors without
    importances) is copied byte for byte. All is checked before the first write. `out` appears under its name only when
    it is complete and on the disk. A run that was killed, or found the disk full, has left the inputs as they were; the
    same call goes on where it stopped, with the folder `.OUT.unlearn_fast` beside `out`. Needs a POSIX system.

    Args:
        model_path: a safetensors file, or a directory with `model.safetensors`, or with
            `model.safetensors.index.json` and its files. A directory's other files are copied, except hidden ones and
            those that hold weights in other formats, which the report lists in `files_left_out`.
        forget_path, reference_path: importances f and r, by the model's names: files in the same forms, divided in any
            way, or what `Importance.save` wrote. F32, F64, BF16 or F16; names may carry a `module.` prefix. Tensors
            that have neither stay unchanged and are listed in the report.
        out: what is written: a file, or a directory, as `model_path` is. It must not exist. May be None for a dry run.
        alpha, lam, exponent, cap, floor: see `dampen_`.
        memory: bytes that may be resident beyond what the process held before, which had imported torch and run an
            operator. Blocks and buffers, threads and parsed headers count; the system's file cache does not.
        dry_run: only make the report: nothing is written.
        progress: show a bar on stderr, where that is a terminal.

    Returns:
        A `DampenReport` of the whole checkpoint, including what was done before a restart.

    Raises:
        ValueError, TypeError: an argument or a file does not fit, or a file is damaged.
        FileNotFoundError, FileExistsError: an input or the folder of `out` is missing; `out` exists.
        OSError: too little room on the disk, or an error of it.

    Source: Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024.
    """
    paths = {"model": Path(model_path), "forget": Path(forget_path), "reference": Path(reference_path)}
    plan = make_plan(paths, Settings(alpha, lam, exponent, cap, floor))
    blocks = blocks_within(memory, plan)
    if out is not None:
        if not dry_run:
            journal.sweep(Path(out))
        check_out(Path(out), paths)
        _check_room(Path(out), plan)
    elif not dry_run:
        raise TypeError("out is None: it must be a path, except for a dry run")
    warn_if_slow("cpu")
    if dry_run or out is None:
        stats = Stream(plan, blocks, None, progress).run()
    else:
        fingerprint = plan.fingerprint()
        workspace = journal.Workspace(Path(out), fingerprint)
        try:
            stats = Stream(plan, blocks, workspace, progress).run()
            if plan.fingerprint() != fingerprint:
                raise OSError("an input changed while it was read: leave the inputs alone, and run the same again")
            for job in plan.jobs:  # last, since a file that may only be read could not be written to
                shutil.copymode(job.source, workspace.data / job.relative)
            workspace.publish()
        finally:
            workspace.close()
    return CheckpointReport(
        tuple(plan.names),
        tuple(plan.elements),
        stats,
        tuple(plan.without_importance),
        files_left_out=tuple(plan.files_left_out),
    )


def _check_room(out: Path, plan: Plan) -> None:
    free = shutil.disk_usage(out.parent).free + journal.held_bytes(out)
    if free < plan.size:
        raise OSError(
            errno.ENOSPC,
            f"out: {plan.size:,} bytes are needed on the disk of {str(out.parent)!r}, and {free:,} are free: make room,"
            " or name a place on another disk",
        )
