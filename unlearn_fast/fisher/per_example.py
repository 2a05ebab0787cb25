"""Moments of per-example gradients over batches: the fast pass, its check, and the one-example way for the rest.

The check (`checking.py`) is made on the first batch, and again whenever the model does something it has not done
before; on every batch where data-dependent indexing may move examples.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.fisher.batches import examples, with_first_again
from unlearn_fast.fisher.checking import Comparison, random_weights
from unlearn_fast.fisher.expressions import Expression, add_moments, gradients_of
from unlearn_fast.fisher.gradients import Moments, dense, wide
from unlearn_fast.fisher.losses import WeightedLosses
from unlearn_fast.fisher.planning import Plan, Planner, Record
from unlearn_fast.fisher.tracing import Trace

Losses = Callable[[nn.Module, Any], Tensor | WeightedLosses]


# Examples of the first batch that are checked: what holds for them holds for all, unless indexing depends on the data,
# for which whole batches are checked. More than two, since two may happen to be alike.
FIRST = 3


class _HalfDone(RuntimeError):
    """Some parameters hold a part of a batch: there is no other way to go on with."""


class PerExample:
    """Adds the moments of every example of a batch to `moments`, parameter by parameter."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        losses: Losses,
        moments: Mapping[str, Moments],
        *,
        warn: bool = True,
    ) -> None:
        self.model, self.parameters, self.losses, self.moments, self.warn = model, parameters, losses, moments, warn
        self.plan: Plan | None = None
        self.slow: dict[str, str] = {}  # parameter -> why it goes the one-example way
        self.saw_gradient = not parameters

    def add(self, batch: Any, n: int) -> None:
        if self.plan is None and n > FIRST and self._fast():
            with self._same_random_numbers():
                self._check(examples(batch, 0, FIRST), FIRST)
        done: set[str] = set()  # parameters whose moments of this batch have been added
        # The ordinary gradient of a single example is its own.
        if n > 1 and self._fast() and (self.plan is None or self.plan.routed or not self._add_fast(batch, n, done)):
            self._check(batch, n, done)
        self._add_slow(batch, n, [name for name in self.parameters if name not in done])

    def _fast(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if name not in self.slow}

    # -- the fast way ----------------------------------------------------------------------------------------------

    def _add_fast(self, batch: Any, n: int, done: set[str]) -> bool:
        """False where the model left the plan; nothing is added then."""
        assert self.plan is not None
        fast = self._fast()
        if fast:
            trace = Trace(self.model, fast, n, self.plan)
            with trace.watching(self.model):
                values, weights = self._losses(batch, n)
                if trace.unplanned:
                    return False
                for k in range(values.shape[1]):
                    trace.backward(values[:, k].sum(), self._adder(_column(weights, k)), retain_graph=_more(values, k))
        done.update(fast)
        return True

    def _adder(self, weights: Tensor | None) -> Callable[[Sequence[Expression]], None]:
        def deliver(expressions: Sequence[Expression]) -> None:
            for name, parts in gradients_of(expressions):
                add_moments(self._weighted(name, weights), parts)

        return deliver

    def _weighted(self, name: str, weights: Tensor | None) -> Moments:
        moments = self.moments[name]
        moments.weights = None if weights is None else weights.to(moments.second)
        return moments

    # -- the check -------------------------------------------------------------------------------------------------

    def _check(self, batch: Any, n: int, done: set[str] | None = None) -> None:
        """Makes a plan, finds what it cannot serve, and, given `done`, adds what it can."""
        known = len(self.slow)
        try:
            self._compare(batch, n, done)
        except Exception as failure:
            with torch.no_grad(), self._same_random_numbers():
                self._losses(batch, n)  # raises what the model itself does wrong
            if isinstance(failure, _HalfDone):
                raise
            why = f"its fast pass failed ({type(failure).__name__}: {failure})"
            self.slow.update({name: why for name in self._fast()})
        if self.warn and len(self.slow) > known:
            self._warn()

    def _compare(self, batch: Any, n: int, done: set[str] | None) -> None:
        record, longer = Record(n + 1), with_first_again(batch)
        with self._same_random_numbers(), record.watching(self.model):
            with_one_more, _ = self._losses(longer, n + 1)
        with self._same_random_numbers():
            comparison = self._ordinary(batch, n, narrow=record.narrow)
        if not comparison.same_losses(with_one_more[:, 0]):
            self.slow.update(dict.fromkeys(self._fast(), "the losses depend on the other examples of the batch"))
            return
        plan = self.plan = Plan()
        trace = Trace(self.model, self._fast(), n, plan, Planner(plan, record, n))
        with trace.watching(self.model):
            values, weights = self._losses(batch, n)
            self.slow.update(plan.opaque)

            def compare(expressions: Sequence[Expression]) -> None:
                for name, parts in gradients_of(expressions):
                    if name in self.slow:
                        continue
                    if not comparison.agrees(name, self.parameters[name], parts):
                        self.slow[name] = "its gradients could not be told apart by example"
                    elif done is not None:
                        add_moments(self._weighted(name, _column(weights, 0)), parts)
                        done.add(name)

            trace.backward(values[:, 0].sum(), compare, retain_graph=_more(values, 0))
            for name in comparison.unseen():
                self.slow.setdefault(name, "it is used where no torch function shows it")
            if done is None:
                return
            done.update(self._fast())
            for k in range(1, values.shape[1]):
                adder = self._adder(_column(weights, k))
                try:
                    trace.backward(values[:, k].sum(), adder, retain_graph=_more(values, k))
                except Exception as failure:
                    raise _HalfDone(f"backward {k} of a batch failed after others had succeeded") from failure

    def _ordinary(self, batch: Any, n: int, *, narrow: bool) -> Comparison:
        """With the ordinary gradients of the weighted losses, of the first of each example where it has several."""
        fast, weights = self._fast(), random_weights(n)
        with _requiring_grad(fast.values()):
            values, _ = self._losses(batch, n)
            grads: Sequence[Tensor | None] = [None] * len(fast)
            if values.requires_grad:
                loss = (values[:, 0] * weights.to(values)).sum()
                grads = torch.autograd.grad(loss, list(fast.values()), allow_unused=True)
        found = {name: dense(g) for name, g in zip(fast, grads, strict=True) if g is not None}
        return Comparison(values[:, 0].detach(), weights, found, narrow=narrow)

    # -- one example at a time ---------------------------------------------------------------------------------------

    def _add_slow(self, batch: Any, n: int, names: Sequence[str]) -> None:
        if not names:
            return
        chosen = [self.parameters[name] for name in names]
        with _requiring_grad(chosen):
            for b in range(n):
                values, weights = self._losses(batch if n == 1 else examples(batch, b, b + 1), 1)
                if not values.requires_grad:  # none of these parameters is used
                    continue
                for k in range(values.shape[1]):
                    grads = torch.autograd.grad(
                        values[:, k].sum(), chosen, allow_unused=True, retain_graph=_more(values, k)
                    )
                    for name, grad in zip(names, grads, strict=True):
                        if grad is not None:
                            self._weighted(name, _column(weights, k)).add(dense(grad)[None].to(wide(grad)))

    def _same_random_numbers(self) -> Any:
        """What is drawn inside will be drawn again afterwards."""
        return torch.random.fork_rng(devices={p.device for p in self.model.parameters() if p.device.type == "cuda"})

    def _losses(self, batch: Any, n: int) -> tuple[Tensor, Tensor | None]:  # [n, K], [n, K]
        given = self.losses(self.model, batch)
        values, weights = given if isinstance(given, WeightedLosses) else (given, None)
        values = checked_losses(values, n, weights)
        self.saw_gradient |= values.requires_grad
        return values, weights

    def _warn(self) -> None:
        owners: dict[str, str] = {}
        for module_name, module in self.model.named_modules():
            for key in module._parameters:
                full = f"{module_name}.{key}" if module_name else key
                if full in self.slow:
                    owners[f"{module_name or 'the model itself'} ({type(module).__name__})"] = self.slow[full]
        listed = "; ".join(f"{owner}: {why}" for owner, why in list(owners.items())[:8])
        more = f"; and {len(owners) - 8} more" if len(owners) > 8 else ""
        warnings.warn(f"measured one example at a time, exact but slow: {listed}{more}", UserWarning, stacklevel=5)


def checked_losses(values: Any, n: int, weights: Any = None) -> Tensor:
    """[n], or [n, K] with weights of that shape, as [n, K]."""
    shape = tuple(values.shape) if isinstance(values, Tensor) else None
    if weights is not None:
        if shape is None or len(shape) != 2 or shape[0] != n or getattr(weights, "shape", None) != shape:
            raise ValueError(f"losses returned WeightedLosses of shape {shape}: both must be [B, K], with B = {n}")
        if weights.requires_grad:
            raise ValueError("losses returned weights that require grad: detach them, they are constants here")
        return values
    if shape != (n,):
        got = f"shape {list(shape)}" if shape is not None else f"a {type(values).__name__}"
        raise ValueError(
            f"losses returned {got} for a batch of {n}: it must return [B], one loss an example, not their mean"
        )
    return values.unsqueeze(1)


def _column(weights: Tensor | None, k: int) -> Tensor | None:
    return None if weights is None else weights[:, k]


def _more(values: Tensor, k: int) -> bool:
    return k + 1 < values.shape[1]


@contextmanager
def _requiring_grad(parameters: Any) -> Iterator[None]:
    parameters = list(parameters)
    for param in parameters:
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in parameters:
            param.requires_grad_(False)
