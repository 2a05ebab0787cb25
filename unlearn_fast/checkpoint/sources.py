"""Checkpoints and importances as files: one safetensors file, or a directory with an index of several."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unlearn_fast.checkpoint.safetensors_file import FLOATING, Entry, SafetensorsFile, read_header
from unlearn_fast.fisher.importance import FIRST

SINGLE = "model.safetensors"
INDEX = SINGLE + ".index.json"
RECORD = "unlearn_fast.importance"  # of `Importance.save`


@dataclass(frozen=True)
class Checkpoint:
    argument: str  # that names it in errors
    path: Path
    files: list[SafetensorsFile]
    index: Path | None

    def entries(self) -> Iterator[tuple[SafetensorsFile, Entry]]:
        return ((file, entry) for file in self.files for entry in file.entries.values())


class Source(NamedTuple):
    """Where an importance lies; `path` is None for that of a frozen parameter, which is 0 and stored nowhere."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path | None
    begin: int = 0


def open_checkpoint(argument: str, path: Path) -> Checkpoint:
    """Reads all headers. A directory is a Hugging Face checkpoint: an index and its files, or one file."""
    if not path.exists():
        raise FileNotFoundError(f"{argument}: {str(path)!r} does not exist: it must be a file or a directory")
    if not path.is_dir():
        return Checkpoint(argument, path, [read_header(argument, path)], None)
    index, single = path / INDEX, path / SINGLE
    if index.exists() and single.exists():
        raise ValueError(f"{argument}: {str(path)!r} holds {SINGLE} and {INDEX}: which is the model? Remove one")
    if single.exists():
        return Checkpoint(argument, path, [read_header(argument, single)], None)
    if not index.exists():
        raise FileNotFoundError(f"{argument}: {str(path)!r} holds neither {INDEX} nor {SINGLE}: it must hold one")
    return Checkpoint(argument, path, _shards(argument, index), index)


def _shards(argument: str, index: Path) -> list[SafetensorsFile]:
    where = f"{argument}: the index {str(index)!r}"
    try:
        parsed = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    names = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{where} must hold a weight_map from names to files")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{where} names {name!r}: it must be a safetensors file beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{where} names {name!r}, which does not exist: the checkpoint must be complete")
        files.append(read_header(argument, index.parent / name))
    held: dict[str, str] = {}
    for file in files:
        for name in file.entries:
            if held.setdefault(name, file.path.name) != file.path.name:
                raise ValueError(f"{argument}: {name!r} is in {held[name]!r} and in {file.path.name!r}: keep one")
    for name in sorted(held.keys() | names.keys()):
        if held.get(name) != names.get(name):
            there, here = (repr(file) if file else "no file" for file in (names.get(name), held.get(name)))
            raise ValueError(f"{where} puts {name!r} into {there}, and {here} holds it: they must agree")
    return files


class Importances:
    """The importances of one set, by the model's names."""

    def __init__(self, checkpoint: Checkpoint, model_names: dict[str, str]) -> None:
        """`model_names`: a name without `module.` -> the model's name."""
        self.argument, self.checkpoint = checkpoint.argument, checkpoint
        self.mode: str | None = None
        self.sources: dict[str, Source] = {}
        for file in checkpoint.files:
            for name, shape in self._frozen(file).items():
                self._add(name, Source(shape, torch.float32, None), model_names)
            for name, entry in file.entries.items():
                if name.startswith(FIRST):
                    continue
                if entry.dtype not in FLOATING:
                    raise TypeError(f"{self.argument}[{name!r}] is {entry.dtype}: it must be {_one_of(FLOATING)}")
                self._add(name, Source(entry.shape, FLOATING[entry.dtype], file.path, entry.begin), model_names)
        if not self.sources:
            raise ValueError(f"{self.argument}: {str(checkpoint.path)!r} holds no importances")

    def _add(self, name: str, source: Source, model_names: dict[str, str]) -> None:
        target = model_names.get(name.removeprefix("module."))
        if target is None:
            raise ValueError(f"{self.argument} has {name!r}: the model has no tensor of that name")
        if target in self.sources:
            raise ValueError(f"{self.argument} has two importances for {target!r}, one as {name!r}: give one")
        self.sources[target] = source

    def _frozen(self, file: SafetensorsFile) -> dict[str, tuple[int, ...]]:
        """What the record of `Importance.save` lists as frozen; empty for any other file."""
        if RECORD not in file.metadata:
            return {}
        try:
            record: Any = json.loads(file.metadata[RECORD])
            self.mode = record["mode"]
            frozen = {str(name): tuple(map(int, shape)) for name, shape in record["frozen"].items()}
            absent = [name for name in record["names"] if name not in frozen and name not in file.entries]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.argument}: the record of importances in {str(file.path)!r} is damaged") from error
        if absent:
            raise ValueError(f"{self.argument}: {str(file.path)!r} lists {absent[0]!r}, and has no data for it")
        return frozen


def names_without_prefix(model: Checkpoint) -> dict[str, str]:
    """A name of the model without `module.` -> the name as the model has it."""
    names: dict[str, str] = {}
    for _, entry in model.entries():
        bare = entry.name.removeprefix("module.")
        if names.setdefault(bare, entry.name) != entry.name:
            raise ValueError(f"model has {names[bare]!r} and {entry.name!r}, which are one name without `module.`")
    return names


def _one_of(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
