"""What a benchmark case is, and the few words that cases are written in."""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Results = tuple[Tensor, ...]
Run = Callable[[Inputs], Results]


class Cost(NamedTuple):
    """What the work needs at the least; the ceiling is the copy bandwidth, or the GEMM rate where there are FLOPs."""

    formula: str
    bytes: int = 0
    flops: int = 0


class Entrant(NamedTuple):
    """One implementation to check and to time."""

    name: str
    kind: str  # "ours", "rival" or "yardstick"
    run: Run
    exact: Run


@dataclass(frozen=True)
class Case:
    """One operator on one kind of input. All runs take the same inputs and return the same results, in one order."""

    operator: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.Generator], Inputs]
    ours: Run
    exact: Run  # the truth that ours and the rivals are checked against before they are timed
    rivals: Mapping[str, Run]
    cost: Cost
    yardsticks: Mapping[str, Run] = field(
        default_factory=dict
    )  # other work, for scale; checked against its float64 self
    variant: str = ""
    overwritten: tuple[str, ...] = ()  # inputs that a run may change: each run gets its own copy of them

    @property
    def name(self) -> str:
        text = f"{self.operator} {self.shape} {str(self.dtype).removeprefix('torch.')}"
        return f"{text}, {self.variant}" if self.variant else text

    def entrants(self) -> list[Entrant]:
        """Ours first."""
        rivals = [Entrant(name, "rival", run, self.exact) for name, run in self.rivals.items()]
        yardsticks = [Entrant(name, "yardstick", run, in_float64(run)) for name, run in self.yardsticks.items()]
        return [Entrant("ours", "ours", self.ours, self.exact), *rivals, *yardsticks]

    def fresh(self, inputs: Inputs) -> Inputs:
        """Inputs for one run. A copied input that requires grad is an activation, no longer a leaf."""
        return {name: value.clone() if name in self.overwritten else value for name, value in inputs.items()}


def forward_backward(function: Callable[..., Tensor], *arguments: str, **options: Any) -> Run:
    """function(*arguments), then its gradients in those that require grad; the cotangent is the input "grad", or 1."""

    def run(x: Inputs) -> Results:
        tensors = [x[name] for name in arguments]
        value = function(*tensors, **options)
        return value, *torch.autograd.grad(value, [t for t in tensors if t.requires_grad], x.get("grad"))

    return run


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, without graph breaks; compiled at its first call, which is never timed."""

    @functools.cache
    def get() -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False)

    return lambda *args, **kwargs: get()(*args, **kwargs)


def in_float64(run: Run) -> Run:
    """The same on the same inputs in float64."""
    return lambda x: run({name: _double(value) for name, value in x.items()})


def _double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)
