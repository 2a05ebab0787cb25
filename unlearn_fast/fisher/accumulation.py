"""What is summed over batches, how sure it is, and how it survives a kill."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from unlearn_fast._files import write_safetensors
from unlearn_fast.fisher.batches import tensors_in
from unlearn_fast.fisher.gradients import Moments, wide

FEWEST_BATCHES = 4  # the spread of fewer says little


class Accumulation:
    """Running sums of every parameter over the batches seen so far.

    With `spread`, each batch is summed apart and joins the running mean and sum of squared deviations (West's form of
    Welford's update, each batch weighing its number of examples): two more tensors a parameter.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], *, absolute: bool = False, first: bool = False, spread: bool = False
    ) -> None:
        def zeros() -> dict[str, Tensor]:
            return {
                name: torch.zeros_like(p, dtype=wide(p), memory_format=torch.contiguous_format)
                for name, p in parameters.items()
            }

        self.examples = self.batches = 0
        self.tensors: dict[str, dict[str, Tensor]] = {"second": zeros()}
        if first:
            self.tensors["first"] = zeros()
        if spread:
            self.tensors |= {"deviations": zeros(), "batch": zeros()}
        second, firsts = self.tensors["batch" if spread else "second"], self.tensors.get("first", {})
        self.moments = {name: Moments(t, firsts.get(name), absolute) for name, t in second.items()}
        """Where a batch adds."""

    def finish_batch(self, n: int) -> None:
        self.examples, self.batches = self.examples + n, self.batches + 1
        if "batch" not in self.tensors:
            return
        for name, batch in self.tensors["batch"].items():
            total, deviations = self.tensors["second"][name], self.tensors["deviations"][name]
            before = self.examples - n
            change = batch / n - total / max(before, 1)
            if before:
                deviations.addcmul_(change, change, value=before * n / self.examples)
            total.add_(batch)
            batch.zero_()

    def relative_error(self) -> float:
        """Standard error of the means, relative to them, both as norms over all parameters; inf where it is unknown."""
        if "batch" not in self.tensors or self.batches < FEWEST_BATCHES:
            return math.inf
        variance = sum(numbers([t.sum(dtype=torch.float64) for t in self.tensors["deviations"].values()]))
        size = sum(numbers([t.double().square().sum() for t in self.tensors["second"].values()])) / self.examples**2
        return math.sqrt(variance / (self.batches - 1) / self.examples / size) if size > 0 else math.inf


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Their values: read together, since reading waits for the device."""
    return torch.stack([t.to(scalars[0].device) for t in scalars]).tolist() if scalars else []


class Checkpoint:
    """The state of a measurement on disk, written now and then, complete or not at all."""

    def __init__(self, path: Any, seconds: float, settings: dict[str, Any]) -> None:
        self.path, self.seconds, self.settings = Path(path), seconds, settings
        if not self.path.parent.is_dir():
            self.refuse("cannot be written, its folder does not exist: make it first")
        self.written = time.monotonic()

    def load(self, accumulation: Accumulation) -> Tensor | None:
        """Fills the accumulation from the file; returns the state of the random numbers, or None without a file."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            opened = safe_open(self.path, "pt")
        except SafetensorError as error:
            self.refuse(f"is damaged ({error}): delete it, or name another file")
        with opened as file:
            record = (file.metadata() or {}).get("unlearn_fast.checkpoint")
            facts = json.loads(record) if record else {}
            if not facts:
                self.refuse("was not written by diagonal_fisher: name another file")
            for name, value in self.settings.items():
                if facts["settings"].get(name) != value:
                    there = facts["settings"].get(name)
                    self.refuse(
                        f"belongs to another measurement ({name} is {there!r} there and {value!r} here): delete it, or"
                        " name another file"
                    )
            accumulation.examples, accumulation.batches = facts["examples"], facts["batches"]
            self.first_batch = facts["first_batch"]
            for kind, tensors in accumulation.tensors.items():
                for name, tensor in tensors.items():
                    tensor.copy_(file.get_tensor(f"{kind}/{name}"))
            return file.get_tensor("random_numbers")

    def check_first(self, batch: Any, *, resumed: bool) -> None:
        """The first batch tells whether these are the data that the file was made from."""
        digest = hashlib.sha256()
        for t in tensors_in(batch):
            flat = t.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float64)
            digest.update(f"{tuple(t.shape)} {t.dtype} {sample.tolist()}".encode())
        if resumed and digest.hexdigest() != self.first_batch:
            self.refuse("was made from other batches: it needs the same ones, in the same order")
        self.first_batch = digest.hexdigest()

    def save(self, accumulation: Accumulation, *, now: bool = False) -> None:
        if not now and time.monotonic() - self.written < self.seconds:
            return
        held = {f"{kind}/{n}": t for kind, tensors in accumulation.tensors.items() for n, t in tensors.items()}
        held["random_numbers"] = torch.get_rng_state()
        facts = {
            "settings": self.settings,
            "examples": accumulation.examples,
            "batches": accumulation.batches,
            "first_batch": self.first_batch,
        }
        write_safetensors(self.path, held, {"unlearn_fast.checkpoint": json.dumps(facts)})
        self.written = time.monotonic()

    def refuse(self, why: str) -> NoReturn:
        raise ValueError(f"checkpoint {str(self.path)!r} {why}")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
