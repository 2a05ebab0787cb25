"""What is to be done, worked out and checked before anything is written."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from unlearn_fast._files import WEIGHTS
from unlearn_fast.checkpoint.safetensors_file import FLOATING, Entry
from unlearn_fast.checkpoint.sources import Checkpoint, Importances, Source, names_without_prefix, open_checkpoint
from unlearn_fast.ops.dampen import check_settings

JOURNAL_FORMAT = 1


class Settings(NamedTuple):
    """In the order of the operator's arguments."""

    alpha: float
    lam: float
    exponent: float
    cap: float
    floor: float


class Edit(NamedTuple):
    """A tensor that is dampened: its bytes in the model's file, and its importances."""

    row: int  # in the report
    begin: int
    end: int
    dtype: torch.dtype
    forget: Source
    reference: Source


class Job(NamedTuple):
    """A file that is copied, with edits in the order of their bytes."""

    source: Path
    relative: Path  # to the output; `.` where that is a file
    size: int
    edits: list[Edit]


@dataclass
class Plan:
    settings: Settings
    jobs: list[Job] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    without_importance: list[str] = field(default_factory=list)
    files_left_out: list[str] = field(default_factory=list)
    inputs: list[tuple[Path, str]] = field(default_factory=list)  # every file that is read, digest of its header
    header_bytes: int = 0

    @property
    def size(self) -> int:
        return sum(job.size for job in self.jobs)

    def fingerprint(self) -> str:
        """Of the settings and all inputs as they are now, so that a restart knows whether it goes on with the same."""
        facts = []
        for path, digest in self.inputs:
            status = os.stat(path)
            facts.append((os.path.realpath(path), status.st_size, status.st_mtime_ns, digest))
        return hashlib.sha256(json.dumps([JOURNAL_FORMAT, self.settings, facts]).encode()).hexdigest()


def make_plan(paths: Mapping[str, Path], settings: Settings) -> Plan:
    """Reads the headers of model, forget and reference, and pairs every tensor with its importances."""
    check_settings(*settings)
    plan = Plan(Settings(*map(float, settings)))
    model = open_checkpoint("model", paths["model"])
    names = names_without_prefix(model)
    forget, reference = (
        Importances(open_checkpoint(argument, paths[argument]), names) for argument in ("forget", "reference")
    )
    if None not in (forget.mode, reference.mode) and forget.mode != reference.mode:
        raise ValueError(
            f"forget was measured in mode {forget.mode!r} and reference in {reference.mode!r}: measure both in one mode"
        )
    for file in model.files:
        edits = [_edit(plan, entry, forget.sources, reference.sources) for entry in file.entries.values()]
        relative = Path(file.path.name) if model.path.is_dir() else Path()
        plan.jobs.append(Job(file.path, relative, file.path.stat().st_size, [e for e in edits if e is not None]))
    for checkpoint in (model, forget.checkpoint, reference.checkpoint):
        plan.inputs += [(file.path, file.digest) for file in checkpoint.files]
        plan.header_bytes += sum(file.header for file in checkpoint.files)
    if model.path.is_dir():
        _add_other_files(plan, model)
    return plan


def _edit(plan: Plan, entry: Entry, forget: Mapping[str, Source], reference: Mapping[str, Source]) -> Edit | None:
    f, r = forget.get(entry.name), reference.get(entry.name)
    if f is None and r is None:
        plan.without_importance.append(entry.name)
        return None
    if f is None or r is None:
        absent = "forget" if f is None else "reference"
        raise ValueError(f"{absent} has no importance for {entry.name!r}, and the other set has: give both or neither")
    if entry.dtype not in FLOATING:
        raise TypeError(
            f"model[{entry.name!r}] is {entry.dtype}, and has an importance: only {', '.join(FLOATING)} are dampened"
        )
    for argument, source in (("forget", f), ("reference", r)):
        if source.shape != entry.shape:
            raise ValueError(
                f"{argument}[{entry.name!r}] has shape {list(source.shape)}:"
                f" it must have the parameter's, {list(entry.shape)}"
            )
    plan.names.append(entry.name)
    plan.elements.append(entry.elements)
    return Edit(len(plan.names) - 1, entry.begin, entry.end, FLOATING[entry.dtype], f, r)


def _add_other_files(plan: Plan, model: Checkpoint) -> None:
    """Configuration, tokenizer and the like, copied as they are."""
    weights = {file.path for file in model.files}
    for folder, folders, names in os.walk(model.path):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # .git and .cache hold old weights
        links = [name for name in folders if (here / name).is_symlink()]
        plan.files_left_out += [str((here / name).relative_to(model.path)) for name in links]
        for name in sorted(names):
            path = here / name
            relative = path.relative_to(model.path)
            if path in weights or name.startswith("."):
                continue
            holds_weights = name.removesuffix(".index.json").endswith(WEIGHTS) and path != model.index
            if holds_weights or not path.is_file():
                plan.files_left_out.append(str(relative))
                continue
            plan.jobs.append(Job(path, relative, path.stat().st_size, []))
            plan.inputs.append((path, ""))


def check_out(out: Path, inputs: Mapping[str, Path]) -> None:
    """Raises where `out` exists, has no folder to lie in, or lies in one of the inputs."""
    if os.path.lexists(out):
        raise FileExistsError(f"out: {str(out)!r} exists: nothing is overwritten, name another place")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: the folder of {str(out)!r} does not exist: make it first")
    parents = out.resolve().parents
    for argument, path in inputs.items():
        if path.resolve() in parents:
            raise ValueError(f"out: {str(out)!r} lies in {argument}, which stays as it is: name another place")
