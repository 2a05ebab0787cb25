"""What a benchmark case is, and the few words that cases are written in."""

import copy
import functools
import gc
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# A wrong result is off by about 1; rounding by far less than this. `unlearn_fast verify` tells how accurate we are.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}

Inputs = dict[str, Any]
Results = tuple[Tensor | None, ...]  # None: what an implementation does not give
Run = Callable[[Inputs], Results]


class Cost(NamedTuple):
    """What the work needs at the least; the ceiling is the copy bandwidth, or the GEMM rate where there are FLOPs."""

    formula: str
    bytes: int = 0
    flops: int = 0


class Entrant(NamedTuple):
    """One implementation to check and to time."""

    name: str
    kind: str  # "ours", "rival", "library" (a rival that others maintain: its mistakes are findings) or "yardstick"
    run: Run
    exact: Run
    units: int = 1  # what one run does so many times: its time is divided by it
    less: str = ""  # another entrant, whose time is subtracted first, round by round


class Verdict(NamedTuple):
    """How the results of an implementation compare with the truth."""

    error: float  # the largest; infinite where it has no meaning
    failure: str  # why the implementation must not be timed
    missing: float = 0.0  # share of the values that it does not give
    note: str = ""


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
    libraries: Mapping[str, Run] = field(default_factory=dict)  # rivals that others maintain, where installed
    variant: str = ""
    overwritten: tuple[str, ...] = ()  # inputs that a run may change: each run gets its own copy of them
    baseline: str = ""  # the yardstick whose time is the unit of the report, where it is not ours
    device: str = "cpu"
    with_host: bool = False  # on a GPU, the time includes what Python takes to launch the work

    @property
    def name(self) -> str:
        text = f"{self.operator} {self.shape} {str(self.dtype).removeprefix('torch.')}"
        return f"{text}, {self.variant}" if self.variant else text

    def entrants(self) -> list[Entrant]:
        """Ours first."""
        rivals = [Entrant(name, "rival", run, self.exact) for name, run in self.rivals.items()]
        yardsticks = [Entrant(name, "yardstick", run, in_float64(run)) for name, run in self.yardsticks.items()]
        libraries = [Entrant(name, "library", run, self.exact) for name, run in self.libraries.items()]
        return [Entrant("ours", "ours", self.ours, self.exact), *rivals, *libraries, *yardsticks]

    def weighed(self) -> "tuple[Case, ...]":
        """The cases whose peak memory is reported with this one."""
        return (self,)

    def counted(self) -> Cost:
        """The cost, which some cases can tell only by running."""
        return self.cost

    def facts(self) -> dict[str, Any]:
        """What else to tell about the case, ready for JSON."""
        return {}

    def remarks(self, peaks: Mapping[str, int]) -> list[str]:
        """Lines to stand below the case's table; `peaks` are bytes beyond the inputs, by implementation."""
        return []

    def verdict(self, entrant: Entrant, results: Results, exact: Results) -> Verdict:
        """Whether the results are right: those of every implementation are asked before it is timed."""
        wrong_by, allowed = error(results, exact), TOLERANCE[self.dtype]
        return Verdict(wrong_by, "" if wrong_by <= allowed else f"wrong by {wrong_by:.1e}, allowed is {allowed:.0e}")

    def warm_up(self, inputs: Inputs) -> Inputs:
        """Inputs for a run that starts threads and compiles, before memory is measured."""
        return self.fresh(inputs)

    def fresh(self, inputs: Inputs) -> Inputs:
        """Inputs for one run. A copied tensor that requires grad is an activation, no longer a leaf."""
        return {name: _copied(value) if name in self.overwritten else value for name, value in inputs.items()}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def make_inputs(case: Case) -> Inputs:
    """Random inputs on the case's device, the same for a case in every process."""
    return case.inputs(torch.Generator(case.device).manual_seed(zlib.crc32(case.name.encode())))


def release() -> None:
    """Gives back what cycles hold, and the GPU's memory that no tensor has: what comes may need nearly all of it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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
    if isinstance(value, (list, tuple)):
        return type(value)(map(_double, value))
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def error(results: Results, exact: Results) -> float:
    """Largest error of an element, relative to it, or to the mean magnitude of its tensor where that is larger."""
    if len(results) != len(exact):
        return float("inf")
    return max(_error(result, truth) for result, truth in zip(results, exact, strict=True))


def _error(result: Tensor | None, exact: Tensor | None) -> float:
    if result is None or exact is None or result.shape != exact.shape:
        return float("inf")
    result, exact = result.detach(), exact.detach()
    smallest = torch.finfo(result.dtype).tiny  # where the truth is 0
    least = max(exact.norm(1, dtype=torch.float64).item() / max(1, exact.numel()), smallest)
    worst = 0.0
    for part, truth in zip(_pieces(result), _pieces(exact), strict=True):
        relative = (part - truth.double()).abs_() / truth.double().abs().clamp_(min=least)
        worst = max(worst, relative.nan_to_num_(nan=float("inf"), posinf=float("inf")).max().item())
    return worst


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Whose temporary tensors are small."""
    return x.reshape(-1).split(1 << 26)


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> Tensor:
    """On the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype).requires_grad_(requires_grad)


def integers(generator: torch.Generator, below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=generator, device=generator.device)


def by_rows(run: Run, *names: str, rows: int = 1024) -> Run:
    """The same for work that is done row by row, some rows of the named inputs at a time, to spare memory."""

    def in_pieces(x: Inputs) -> Results:
        pieces = [
            run({**x, **{n: x[n][i : i + rows].detach().requires_grad_(x[n].requires_grad) for n in names}})
            for i in range(0, len(x[names[0]]), rows)
        ]
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    return in_pieces
