"""Watching the torch functions that a model calls, and helpers for their arguments and results."""

import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unlearn_fast.fisher.rules import module_rule

# Functions in Python that hold others which parameters enter, or that run parts of the forward again (checkpoints, in a
# backward): these are looked into.
OPENED = (F.multi_head_attention_forward, torch.autograd.backward)


class Watch(TorchFunctionMode):
    """While active, `call` stands for every torch function, and `module_call` for modules that have a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = 0

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def module_call(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Returns what takes the place of the module's result, or None."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func in OPENED:
            with self:
                return _opened(func)(*args, **kwargs)
        return self.call(func, args, kwargs)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Active, with hooks on the modules that have a rule of their own; functions inside these are not seen."""
        handles = []
        for module in model.modules():
            if module_rule(module) is not None:
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True, prepend=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.paused += 1

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        self.paused -= 1
        if self.paused:
            return None
        with unwatched():
            return self.module_call(module, args, kwargs, result)


def unwatched() -> Any:
    """No function inside is seen; cheaper than being seen and passed on."""
    return torch._C.DisableTorchFunction()


@cache
def _opened(func: types.FunctionType) -> types.FunctionType:
    """The same function without its own question for a mode, so that the mode sees the functions inside."""
    blind = {name: lambda *_: False for name in func.__globals__ if name.startswith("has_torch_function")}
    opened = types.FunctionType(func.__code__, {**func.__globals__, **blind}, func.__name__, func.__defaults__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


@cache
def argument_names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def is_in_place(func: Any) -> bool:
    """By the name: add_, __iadd__, __setitem__."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"))
    return name.endswith("_")


def replaced(args: Any, kwargs: Any, values: Mapping[Any, Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with other tensors in some places."""
    args, kwargs = list(args), dict(kwargs)
    for place, value in values.items():
        if isinstance(place, int):
            args[place] = value
        elif isinstance(place, str):
            kwargs[place] = value
        else:
            i, j = place
            args[i] = type(args[i])(value if k == j else part for k, part in enumerate(args[i]))
    return args, kwargs


def all_tensors(value: Any) -> list[Tensor]:
    """In nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (tuple, list)):
        for part in value:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, (tuple, list)):
                found += all_tensors(part)
    return found


def shapes_of(result: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in all_tensors(result)]
