"""Importances with what they were measured on, in memory and on disk."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from unlearn_fast._files import write_safetensors

FIRST = "first_moment/"  # in front of names in a file


class Importance(Mapping[str, Tensor]):
    """Name -> float32 importance, shaped like the parameter, with its metadata.

    Frozen parameters have importance 0: an expanded zero, which takes no memory.

    Attributes:
        examples: how many examples were averaged.
        batches: in how many batches they came.
        mode: "per_example" or "batch".
        fingerprint: of the model that was measured, see `model_fingerprint`.
        relative_error: estimated standard error relative to the importances, as norms; None where it was not estimated.
        first_moment: name -> mean gradient, where it was asked for; None otherwise.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        examples: int,
        batches: int,
        mode: str,
        fingerprint: str,
        relative_error: float | None = None,
        first_moment: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.examples = examples
        self.batches = batches
        self.mode = mode
        self.fingerprint = fingerprint
        self.relative_error = relative_error
        self.first_moment = None if first_moment is None else dict(first_moment)

    def variance(self) -> dict[str, Tensor]:
        """Name -> `max(E[g^2] - E[g]^2, 0)`, the variance of each gradient over the examples.

        Raises:
            ValueError: the importances are not squares, or have no first moment (`first_moment=True` measures it).
        """
        if self.mode != "per_example" or self.first_moment is None:
            raise ValueError(
                f"these importances have mode {self.mode!r} and {'no' if self.first_moment is None else 'a'} first"
                " moment: the variance needs diagonal_fisher(..., first_moment=True) in mode 'per_example'"
            )
        return {name: (t - self.first_moment[name].square()).clamp_(min=0) for name, t in self.items()}

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
        frozen = {name: list(t.shape) for name, t in self.items() if _is_expanded_zero(t)}
        held = {name: t for name, t in self.items() if name not in frozen}
        if self.first_moment is not None:
            held |= {FIRST + name: t for name, t in self.first_moment.items() if name not in frozen}
        facts = {name: getattr(self, name) for name in ("examples", "batches", "mode", "fingerprint", "relative_error")}
        facts |= {"names": list(self), "frozen": frozen, "has_first_moment": self.first_moment is not None}
        write_safetensors(Path(path), held, {"unlearn_fast.importance": json.dumps(facts)})

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

            def tensors(prefix: str = "") -> dict[str, Tensor]:
                return {
                    name: torch.zeros(()).expand(frozen[name]) if name in frozen else file.get_tensor(prefix + name)
                    for name in names
                }

            first = tensors(FIRST) if facts.pop("has_first_moment", False) else None
            return cls(tensors(), first_moment=first, **facts)


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
