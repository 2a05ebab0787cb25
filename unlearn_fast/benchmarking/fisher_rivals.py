"""Other ways to the per-example diagonal Fisher, and what it is measured in: one ordinary forward and backward.

Every function takes a model, batches and `losses(model, batch) -> [B]`, and returns one tensor for each of
`model.parameters()`, in their order, or None where it has none to give.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Batches = Sequence[Any]
Losses = Callable[..., Any]  # (model, batch) -> [B]
Fisher = tuple[Tensor | None, ...]


def split(batch: Any, size: int) -> Iterator[Any]:
    """The batch, a tensor or a tuple of tensors, in pieces of so many examples."""
    if isinstance(batch, Tensor):
        yield from batch.split(size)
    else:
        yield from zip(*(tensor.split(size) for tensor in batch), strict=True)


def examples(batches: Batches) -> int:
    return sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in batches)


def ordinary_gradients(model: nn.Module, batches: Batches, losses: Losses) -> Fisher:
    """One ordinary forward and backward a batch, as in training without the optimiser; the last batch's gradients."""
    parameters = list(model.parameters())
    gradients: Fisher = ()
    for batch in batches:
        gradients = ()  # as an optimiser's zero_grad frees them
        gradients = torch.autograd.grad(losses(model, batch).mean(), parameters)
    return gradients


def released_fisher(model: nn.Module, batches: Batches, losses: Losses) -> Fisher:
    """The released SSD code's importance: the square of each batch's mean gradient, which is another quantity."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        for total, grad in zip(sums, torch.autograd.grad(losses(model, batch).mean(), parameters), strict=True):
            total += grad.square()
    return tuple(total / len(batches) for total in sums)


def one_example_fisher(model: nn.Module, batches: Batches, losses: Losses) -> Fisher:
    """The definition: the square of every single example's gradient."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        for example in split(batch, 1):
            for total, grad in zip(sums, torch.autograd.grad(losses(model, example).sum(), parameters), strict=True):
                total += grad.square()
    return tuple(total / examples(batches) for total in sums)


class _Losses(nn.Module):
    """The losses as a module, so that torch.func can call them with other parameters."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, batch: Any) -> Tensor:
        return self.losses(self.model, batch)


def vmap_fisher(model: nn.Module, batches: Batches, losses: Losses, *, chunk: int) -> Fisher:
    """torch.func's per-example gradients of `chunk` examples at once, squared and added before the next chunk."""
    module = _Losses(model, losses)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def loss(values: dict[str, Tensor], example: Any) -> Tensor:
        return torch.func.functional_call(module, values, (_with_batch_axis(example),)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    for batch in batches:
        for piece in split(batch, chunk):
            for name, grad in gradients(parameters, piece).items():
                sums[name] += grad.square().sum(0)  # not in place: gradients may share memory
    return tuple(total / examples(batches) for total in sums.values())


def _with_batch_axis(example: Any) -> Any:
    return example[None] if isinstance(example, Tensor) else tuple(tensor[None] for tensor in example)


def backpack_fisher(model: nn.Module, batches: Batches, losses: Losses) -> Fisher:
    """BackPACK's SumGradSquared, on a model that it has extended."""
    _require("backpack")
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    own = _own_copy(model, "backpack", lambda copied: extend(copied.eval()))
    sums: list[Tensor | None] = [None for _ in own.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules that it has no rule for
        for batch in batches:
            with backpack(SumGradSquared()):
                losses(own, batch).sum().backward()
            for i, param in enumerate(own.parameters()):
                sums[i] = _added(sums[i], param.__dict__.pop("sum_grad_squared", None))
                param.grad = None
    return tuple(total if total is None else total / examples(batches) for total in sums)


def opacus_fisher(model: nn.Module, batches: Batches, losses: Losses) -> Fisher:
    """Opacus' per-example gradients of a whole batch, squared."""
    _require("opacus")
    own = _own_copy(model, "opacus", _opacus_module)
    sums: list[Tensor | None] = [None for _ in own.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches:
            losses(own, batch).sum().backward()
            for i, param in enumerate(own.parameters()):
                held = vars(param)
                if held.get("grad_sample") is not None:
                    sums[i] = _added(sums[i], held["grad_sample"].square().sum(0))
                    held["grad_sample"] = None
                param.grad = None
    return tuple(total if total is None else total / examples(batches) for total in sums)


def _opacus_module(model: nn.Module) -> nn.Module:
    from opacus import GradSampleModule

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.requires_grad_(False)  # it refuses trainable modules that have buffers
    own = GradSampleModule(model, loss_reduction="sum").train()  # it records in training mode only
    for norm in norms:
        norm.eval()
    return own


def _added(total: Tensor | None, value: Tensor | None) -> Tensor | None:
    return value if total is None else total if value is None else total.add_(value)


# A library changes the model that it works on; so each has its own copy, made at the first run, which is never timed.
_copies: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


def _own_copy(model: nn.Module, library: str, prepare: Callable[[nn.Module], nn.Module]) -> nn.Module:
    copies = _copies.setdefault(model, {})
    if library not in copies:
        copies[library] = prepare(copy.deepcopy(model))
    return copies[library]


def versions() -> dict[str, str | None]:
    """Of the other libraries; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in ("backpack-for-pytorch", "opacus"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _require(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(f"{library} is not installed: pip install 'unlearn_fast[rivals]'")
