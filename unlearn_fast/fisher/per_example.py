"""Moments of per-example gradients over batches: the fast pass, its check, and the one-example way for the rest.

The check proves on a whole batch that gradients are attributed to the right examples. With G_b what the fast pass takes
for the gradient of example b, and random weights w_b, it compares `sum_b w_b G_b` with the ordinary gradient of
`sum_b w_b loss_b`. They agree for all w if and only if every G_b is the gradient of loss_b; for random w, disagreement
shows with probability 1. It is made on the first batch, and again whenever the model does something it has not done
before; on every batch where data-dependent indexing may move examples.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.fisher.batches import examples, with_first_again
from unlearn_fast.fisher.expressions import Expression, Parts, add_moments, gradients_of, weighted_sum
from unlearn_fast.fisher.gradients import Moments, dense, wide
from unlearn_fast.fisher.losses import WeightedLosses
from unlearn_fast.fisher.planning import Plan, Planner, Record
from unlearn_fast.fisher.tracing import Trace

Losses = Callable[[nn.Module, Any], Tensor | WeightedLosses]

# How far the two sides of the check may differ, relative to their norm, before the fast way is given up. A wrong
# attribution is off by about 1; rounding by far less than this.
TOLERANCE, NARROW_TOLERANCE = 1e-4, 5e-2  # the second where anything is computed in 16 bits
# A gradient that is mathematically zero (an attention key's bias) is rounding noise on both sides: so many ulps of the
# largest gradient are no disagreement.
NOISE_ULPS = 64


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
        self.checks = 0

    def add(self, batch: Any, n: int) -> None:
        done: set[str] = set()  # parameters whose moments of this batch have been added
        # The ordinary gradient of a single example is its own.
        if n > 1 and self._fast() and (self.plan is None or self.plan.routed or not self._add_fast(batch, n, done)):
            self._add_checked(batch, n, done)
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

    def _add_checked(self, batch: Any, n: int, done: set[str]) -> None:
        known = len(self.slow)
        self.checks += 1
        try:
            self._check_and_add(batch, n, done)
        except Exception as failure:
            with torch.no_grad(), self._same_random_numbers():
                self._losses(batch, n)  # raises what the model itself does wrong
            if isinstance(failure, _HalfDone):
                raise
            why = f"its fast pass failed ({type(failure).__name__}: {failure})"
            self.slow.update({name: why for name in self._fast()})
        if self.warn and len(self.slow) > known:
            self._warn()

    def _check_and_add(self, batch: Any, n: int, done: set[str]) -> None:
        weights, record = _random_weights(n), Record(n + 1)
        longer = with_first_again(batch)
        with self._same_random_numbers(), record.watching(self.model):
            with_one_more, _ = self._losses(longer, n + 1)
        with self._same_random_numbers():
            alone, expected = self._ordinary_gradients(batch, n, weights)
        tolerance = NARROW_TOLERANCE if record.narrow else TOLERANCE
        if not torch.allclose(alone, with_one_more[:n].detach(), 10 * tolerance, 10 * tolerance, equal_nan=True):
            self.slow.update(dict.fromkeys(self._fast(), "losses depend on the other examples of the batch"))
            return
        largest = max((float(g.norm()) for g in expected.values()), default=0.0)
        noise = NOISE_ULPS * torch.finfo(torch.float32).eps * largest if math.isfinite(largest) else 0.0
        plan = self.plan = Plan()
        trace = Trace(self.model, self._fast(), n, plan, Planner(plan, record, n))
        with trace.watching(self.model):
            values, of_losses = self._losses(batch, n)
            self.slow.update(plan.opaque)

            def check_and_add(expressions: Sequence[Expression]) -> None:
                for name, parts in gradients_of(expressions):
                    if name not in self.slow and self._agree(
                        name, parts, weights, expected.pop(name, None), noise, tolerance
                    ):
                        add_moments(self._weighted(name, _column(of_losses, 0)), parts)
                        done.add(name)

            trace.backward(values[:, 0].sum(), check_and_add, retain_graph=_more(values, 0))
            for name, gradient in expected.items():  # of what the trace has not seen
                if name not in self.slow and float(gradient.norm()) > noise:
                    self.slow[name] = "it is used where no torch function shows it"
            done.update(self._fast())
            for k in range(1, values.shape[1]):
                try:
                    trace.backward(
                        values[:, k].sum(), self._adder(_column(of_losses, k)), retain_graph=_more(values, k)
                    )
                except Exception as failure:
                    raise _HalfDone(f"backward {k} of a batch failed after others had succeeded") from failure

    def _ordinary_gradients(self, batch: Any, n: int, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses, and the gradients of the sum of the weighted first ones."""
        fast = self._fast()
        with _requiring_grad(fast.values()):
            values, _ = self._losses(batch, n)
            if not values.requires_grad:
                return values, {}
            loss = (values[:, 0] * weights.to(values)).sum()
            grads = torch.autograd.grad(loss, list(fast.values()), allow_unused=True)
        return values.detach(), {n: dense(g) for n, g in zip(fast, grads, strict=True) if g is not None}

    def _agree(
        self, name: str, parts: Parts, weights: Tensor, expected: Tensor | None, noise: float, tolerance: float
    ) -> bool:
        param = self.parameters[name]
        ours = weighted_sum(param, weights.to(param.device, wide(param)), parts)
        theirs = torch.zeros_like(ours) if expected is None else expected.to(ours.dtype)
        size = float(theirs.norm())
        if float((ours - theirs).norm()) <= tolerance * size + noise:
            return True
        if not math.isfinite(size) and torch.equal(ours.isfinite(), theirs.isfinite()):
            return True  # gradients that are not finite, in the same places
        self.slow[name] = "its gradients could not be told apart by example"
        return False

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


def _random_weights(n: int) -> Tensor:
    """Between 0.5 and 1.5 in size, of either sign; always the same, so that runs repeat."""
    generator = torch.Generator().manual_seed(n)
    return (torch.rand(n, generator=generator) + 0.5) * (1 - 2 * torch.randint(2, (n,), generator=generator))


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
