"""Importances with what they were measured on, in memory and on disk."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


class Importance(Mapping[str, Tensor]):
    """Name -> float32 importance, shaped like the parameter, with its metadata.

    Frozen parameters have importance 0: an expanded zero, which takes no memory.

    Attributes:
        examples: how many examples were averaged.
        batches: in how many batches they came.
        mode: "per_example" or "batch".
        fingerprint: of the model that was measured, see `model_fingerprint`.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, examples: int, batches: int, mode: str, fingerprint: str
    ) -> None:
        self._tensors = dict(tensors)
        self.examples = examples
        self.batches = batches
        self.mode = mode
        self.fingerprint = fingerprint

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Importance({len(self)} parameters, {self.examples} examples, mode={self.mode!r})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file. It appears under its name only when it is complete."""
        from safetensors.torch import save_file

        path = Path(path)
        frozen = {name: list(t.shape) for name, t in self.items() if _is_expanded_zero(t)}
        held = {name: t.detach().contiguous() for name, t in self.items() if name not in frozen}
        facts = {name: getattr(self, name) for name in ("examples", "batches", "mode", "fingerprint")}
        metadata = {"unlearn_fast.importance": json.dumps({**facts, "names": list(self), "frozen": frozen})}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(held, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Importance":
        """Reads what `save` wrote; ValueError for any other safetensors file."""
        from safetensors import safe_open

        with safe_open(os.fspath(path), "pt") as file:
            record = (file.metadata() or {}).get("unlearn_fast.importance")
            if record is None:
                raise ValueError(
                    f"path {os.fspath(path)!r} holds no importances: it must be a file that Importance.save wrote"
                )
            facts = json.loads(record)
            names, frozen = facts.pop("names"), facts.pop("frozen")
            tensors = {
                name: torch.zeros(()).expand(frozen[name]) if name in frozen else file.get_tensor(name)
                for name in names
            }
        return cls(tensors, **facts)


def _is_expanded_zero(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and not any(tensor.stride()) and not tensor.is_contiguous() and not bool(tensor.any())


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the parameters' names, shapes, dtypes, and a sample of at most 256 values of each."""
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        flat = param.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(param.shape)} {param.dtype}".encode())
        digest.update(bytes(str(sample.tolist()), "ascii"))
    return digest.hexdigest()[:32]
