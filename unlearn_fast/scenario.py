"""What a scenario of `verify` is."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

import unlearn_fast
from unlearn_fast import reference

Tensors = dict[str, Tensor]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Scenario:
    """What to compute from which inputs; `run` works with either library, which have the same names and signatures."""

    operator: str
    name: str
    inputs: Callable[[torch.Generator], Tensors]  # float64, and integers
    run: Callable[[ModuleType, Tensors], Tensors]
    ours: ModuleType = unlearn_fast
    reference: ModuleType = reference
    wide: tuple[str, ...] = ()  # inputs that stay in at least float32
    dtypes: tuple[torch.dtype, ...] = DTYPES
    ulps: float = 4.0  # torch is sometimes exact by luck; exp, sum, log and product may each cost an ulp
    cancels: bool = False  # results are sums whose terms cancel: errors count relative to the tensor's root mean square
    beyond_torch: bool = False  # torch loses the result there: its own error does not count
