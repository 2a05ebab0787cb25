"""Taps: what every covered module sees in one forward and backward, with all weight gradients switched off.

A forward hook passes the module's output through an autograd function that also takes a dummy scalar which requires
grad. The loss gradient of the output thereby reaches the tap although no parameter requires grad, and the ordinary
weight gradients, a third of a backward, are never computed.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.fisher.gradients import PerExampleGradient, add_squares_of_sum_
from unlearn_fast.fisher.rules import rule_for

Call = tuple[str, int]  # module name, number of its call in the forward


OWN = ("weight", "bias")  # the parameters that rules know


class Taps:
    """The covered modules of a model, and the sums of squares that their parameters receive.

    `growth[call]` says how the leading axis of a call's input grows: by this many entries an example, or 0 where it
    does not depend on the batch (position ids, say).
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        names = {id(param): name for name, param in parameters.items()}
        self.modules: dict[str, nn.Module] = {}
        self.covered: dict[str, dict[str, str]] = {}  # module name -> its parameter's own name -> full name
        for name, module in model.named_modules():
            # Further parameters, of a subclass or of a parametrization, have no rule.
            own = {key: names[id(p)] for key, p in module._parameters.items() if id(p) in names and key in OWN}
            if own and rule_for(module) is not None:
                self.modules[name] = module
                self.covered[name] = own

    @contextmanager
    def watch(self) -> Iterator[dict[Call, int]]:
        """Records the leading size of every covered call's input."""
        sizes: dict[Call, int] = {}

        def note(call: Call, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
            sizes[call] = x.shape[0] if x.dim() else 1
            return output

        with self._hooked(note):
            yield sizes

    @contextmanager
    def accumulate(
        self, sums: Mapping[str, Tensor], n: int, growth: Mapping[Call, int | None]
    ) -> Iterator["Accumulation"]:
        """Adds the squares of n examples to `sums` during a forward and backward inside this context."""
        accumulation = Accumulation(self, sums, n, growth)
        with self._hooked(accumulation.tap):
            yield accumulation

    @contextmanager
    def _hooked(self, visit: Callable[[Call, nn.Module, Tensor, Tensor], Tensor]) -> Iterator[None]:
        calls: Counter[str] = Counter()

        def hook_for(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                x = args[0] if args else kwargs.get("input")
                if not (torch.is_grad_enabled() and isinstance(x, Tensor) and isinstance(output, Tensor)):
                    return None
                calls[name] += 1
                return visit((name, calls[name] - 1), module, x, output)

            return hook

        # First in line, so that it sees the module's own output even where other forward hooks replace it.
        handles = [
            module.register_forward_hook(hook_for(name), with_kwargs=True, prepend=True)
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Accumulation:
    """One forward and backward's worth of squares."""

    def __init__(self, taps: Taps, sums: Mapping[str, Tensor], n: int, growth: Mapping[Call, int | None]) -> None:
        self.taps, self.sums, self.n, self.growth = taps, sums, n, growth
        self.trigger = torch.zeros((), requires_grad=True)
        self.unfit: set[str] = set()  # parameters of a call whose layout is not the known one
        self.expected: Counter[str] = Counter()
        self.arrived: dict[str, list[PerExampleGradient]] = {}

    def tap(self, call: Call, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        params = self.taps.covered[call[0]].values()
        if not self._fits(self.growth.get(call), x, output):
            self.unfit.update(params)
            return output
        self.expected.update(params)
        copies = self.n if self.growth[call] == 0 else 0
        return _Tap.apply(self.trigger, output, x, copies, lambda *seen: self._receive(call[0], *seen))

    def _fits(self, growth: int | None, x: Tensor, output: Tensor) -> bool:
        """Whether the leading axis of this call can be divided among the examples as it was in the check."""
        if growth is None or x.dim() == 0 or output.dim() == 0 or len(x) != len(output):
            return False
        return growth == 0 or (len(x) == self.n if growth == 1 else len(x) % self.n == 0)

    def _receive(self, name: str, x: Tensor, grad: Tensor) -> None:
        module, own = self.taps.modules[name], self.taps.covered[name]
        rule = rule_for(module)
        assert rule is not None
        try:
            gradients = rule(module, x, grad, self.n)
        except NotImplementedError:
            self.unfit.update(own.values())
            return
        for key, param in own.items():
            if param not in self.sums or param in self.unfit:
                continue
            uses = self.arrived.setdefault(param, [])
            uses.append(gradients[key])
            if len(uses) == self.expected[param]:
                add_squares_of_sum_(self.sums[param], self.arrived.pop(param))

    def backward(self, losses: Tensor) -> None:
        """Runs the backward, then adds the parameters of which some uses had no path to the loss."""
        if losses.requires_grad:
            torch.autograd.grad(losses.sum(), self.trigger, allow_unused=True)
        for param, uses in self.arrived.items():
            if param not in self.unfit:
                add_squares_of_sum_(self.sums[param], uses)
        self.arrived.clear()


class _Tap(torch.autograd.Function):
    """Identity whose backward hands over the module's input and the loss gradient of its output.

    With `copies`, an output that all examples share is expanded over them (no memory), so that its gradient arrives per
    example: [1, ...] becomes [copies, ...], and [L, ...] becomes [copies, L, ...], as broadcasting would have it.
    """

    @staticmethod
    def forward(
        ctx: Any, trigger: Tensor, output: Tensor, x: Tensor, copies: int, receive: Callable[..., None]
    ) -> Tensor:
        # Saved through the context: an in-place change of the input afterwards is then an error, not a wrong result.
        ctx.save_for_backward(x)
        ctx.copies, ctx.receive, ctx.shape = copies, receive, output.shape
        return _expanded(output.detach(), copies) if copies else output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if not ctx.copies:
            ctx.receive(x, grad)
            return None, grad, None, None, None
        examples_first = grad.reshape(-1, *ctx.shape[1:])
        ctx.receive(_expanded(x, ctx.copies).reshape(-1, *x.shape[1:]), examples_first)
        return None, grad.reshape(ctx.copies, *ctx.shape).sum(0), None, None, None


def _expanded(t: Tensor, copies: int) -> Tensor:
    return t.expand(copies, *t.shape[1:]) if len(t) == 1 else t.expand(copies, *t.shape)
