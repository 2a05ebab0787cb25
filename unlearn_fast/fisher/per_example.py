"""Moments of per-example gradients over batches: the fast pass, its check, and the one-example way for the rest.

The check (`checking.py`) is made on the first batch, and again whenever the model does something it has not done
before; on every batch where data-dependent indexing may move examples.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.fisher.accumulation import numbers
from unlearn_fast.fisher.batches import examples, in_own_containers, tensors_in, with_first_again
from unlearn_fast.fisher.calls import unwatched
from unlearn_fast.fisher.checking import LAXER, Comparison, random_weights, same_losses
from unlearn_fast.fisher.expressions import Expression, add_moments, gradients_of
from unlearn_fast.fisher.gradients import Moments, dense, wide
from unlearn_fast.fisher.losses import WeightedLosses
from unlearn_fast.fisher.planning import Plan, Planner, Record
from unlearn_fast.fisher.tracing import Deliver, Trace

Losses = Callable[[nn.Module, Any], Tensor | WeightedLosses]


# Examples of the first batch that are checked: what holds for them holds for all, unless indexing depends on the data,
# for which whole batches are checked. More than two, since two may happen to be alike.
FIRST = 3
# As many examples are compared again in the 64th, the 256th, the 1024th batch, ..., at about half a batch each time.
AGAIN, FACTOR = 64, 4


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
        self.expressions = {name: Expression.of_parameter(name, p) for name, p in parameters.items()}
        self.plan: Plan | None = None
        self.proved: set[str] = set()  # parameters whose gradients a check has seen, and found right
        self.slow: dict[str, str] = {}  # parameter -> why it goes the one-example way
        self.saw_gradient = not parameters
        self.plain_backward = False  # whether the model has reentrant checkpoints
        self.narrow = False  # whether it computes in 16 bits
        self.slack = 1.0  # of further checks; less where any gradients could not be told apart
        self.copies = False  # whether the model changes its batches in place
        self.batches, self.again, self.told = 0, AGAIN, 0
        for name, param in parameters.items():
            if param._backward_hooks:  # no fast pass computes the gradient that the hook is for
                self.slow[name] = "it has a hook on its gradient"

    def add(self, batch: Any, n: int) -> None:
        self.batches += 1
        done: set[str] = set()  # parameters whose moments of this batch have been added
        if n > 1 and self._fast():  # the ordinary gradient of a single example is its own
            if self.plan is None and n > FIRST:
                self._check(examples(batch, 0, FIRST), FIRST)
            elif self.plan is not None and self.batches >= self.again:
                self.again *= FACTOR
                self._check_again(examples(batch, 0, FIRST), min(n, FIRST))
            if self.plan is None or self.plan.routed or not self._add_fast(batch, n, done):
                self._check(batch, n)
                self._add_fast(batch, n, done)
        self._add_slow(batch, n, [name for name in self.parameters if name not in done])
        if self.warn and len(self.slow) > self.told:
            self.told = len(self.slow)
            self._warn()

    def _fast(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if name not in self.slow}

    # -- the fast way ----------------------------------------------------------------------------------------------

    def _add_fast(self, batch: Any, n: int, done: set[str]) -> bool:
        """False where the model left the plan, or where parameters have gradients that no check has seen yet."""
        fast = {name: p for name, p in self._fast().items() if name not in done}
        if self.plan is None or not fast:
            return True
        trace, arrived = self._trace(fast, n, self.plan), dict[str, list[Tensor]]()
        with trace.watching(self.model):
            values, weights = self._losses(batch, n)
            if trace.unplanned:
                return False
            for k in range(values.shape[1]):
                adder = self._adder(_column(weights, k), arrived)
                trace.backward(values[:, k].sum(), adder, retain_graph=_more(values, k))
        # All at once, since reading them waits for the device.
        flags = iter(numbers([t for found in arrived.values() for t in found]))
        unproved = {name for name, found in arrived.items() if any([next(flags) for _ in found])}
        done.update(fast.keys() - unproved)
        return not unproved

    def _trace(self, names: Iterable[str], n: int, plan: Plan, planner: Planner | None = None) -> Trace:
        return Trace(self.model, [self.expressions[name] for name in names], n, plan, planner)

    def _adder(self, weights: Tensor | None, arrived: dict[str, list[Tensor]]) -> Deliver:
        """Of parameters that no check has proved, tells in `arrived` whether they have gradients; zeros add nothing."""

        def deliver(expressions: Sequence[Expression]) -> None:
            for name, parts in gradients_of(expressions):
                if name in self.proved:
                    add_moments(self._weighted(name, weights), parts)
                else:
                    arrived.setdefault(name, []).extend(t.any() for _, g in parts for t in g.sources())

        return deliver

    def _weighted(self, name: str, weights: Tensor | None) -> Moments:
        moments = self.moments[name]
        moments.weights = None if weights is None else weights.to(moments.second)
        return moments

    # -- the check -------------------------------------------------------------------------------------------------

    def _check(self, batch: Any, n: int) -> None:
        """Makes or extends the plan, and finds what it serves and what it cannot serve."""
        try:
            with self._same_random_numbers():
                self.proved |= self._compare(batch, n)
        except Exception as failure:
            with _requiring_grad(self.parameters.values()), self._same_random_numbers():
                self._losses(batch, n)  # raises what the model itself does wrong
            why = f"its fast pass failed ({type(failure).__name__}: {failure})"
            self.slow.update({name: why for name in self._fast()})

    def _check_again(self, batch: Any, n: int) -> None:
        """Compares what the plan makes of these examples: a change that nothing shows is found late, but found."""
        assert self.plan is not None
        with self._same_random_numbers():
            _, comparison = self._ordinary(batch, n)
        comparison.slack = LAXER
        with self._same_random_numbers():
            trace = self._trace(self._fast(), n, self.plan)
            self._subtract(comparison, trace, batch, n)
        wrong = [name for name in comparison.disagreeing() if name in self.proved]
        if wrong and not trace.unplanned:
            raise RuntimeError(
                f"the gradients of {', '.join(wrong[:8])} no longer reach the right examples in batch {self.batches}:"
                " the model does something else with these data, unseen. Measure it with one example a batch."
            )

    def _compare(self, batch: Any, n: int) -> set[str]:
        """Returns the parameters whose gradients are shown to be attributed rightly."""
        fast, record, longer = self._fast(), Record(n + 1), with_first_again(batch)
        with _requiring_grad(fast.values()), self._same_random_numbers(), record.watching(self.model):
            versions = _versions(longer)
            self._losses(longer, n + 1)
            self.copies |= versions != _versions(longer)
        del longer
        self.narrow |= record.narrow
        with self._same_random_numbers():
            values, comparison = self._ordinary(batch, n)
        comparison.slack = self.slack
        if not self._independent(batch, values):
            self.slow.update(dict.fromkeys(fast, "the losses depend on the other examples of the batch"))
            return set()
        plan = Plan()
        trace = self._trace(fast, n, plan, Planner(plan, record, n))
        self._subtract(comparison, trace, batch, n)
        self.plan = self.plan or Plan()
        self.plan.learn(plan)
        self.slow.update(plan.opaque)
        for name in comparison.disagreeing():
            seen = name in comparison.arrived
            why = "its gradients could not be told apart by example" if seen else "no torch function shows its use"
            self.slow.setdefault(name, why)
        self.slack = comparison.slack
        return comparison.proved()

    def _subtract(self, comparison: Comparison, trace: Trace, batch: Any, n: int) -> None:
        """Takes what the trace finds from the ordinary gradients."""
        comparison.narrow, opaque = self.narrow, trace.plan.opaque
        with trace.watching(self.model):
            values, _ = self._losses(batch, n)
            if trace.planner is None and trace.unplanned:
                return
            for k in range(values.shape[1]):

                def compare(expressions: Sequence[Expression], k: int = k) -> None:
                    for name, parts in gradients_of(expressions):
                        if name not in opaque:
                            comparison.subtract(name, self.parameters[name], parts, k)

                trace.backward(values[:, k].sum(), compare, retain_graph=_more(values, k))

    def _ordinary(self, batch: Any, n: int) -> tuple[Tensor, Comparison]:
        """The losses [n, K], and the ordinary gradients of their weighted sum."""
        fast = self._fast()
        with _requiring_grad(fast.values()):
            values, _ = self._losses(batch, n)
            weights = random_weights(n, values.shape[1])
            grads: Sequence[Tensor | None] = [None] * len(fast)
            if values.requires_grad:
                loss = (values * weights.to(values)).sum()
                grads = torch.autograd.grad(loss, list(fast.values()), allow_unused=True)
        found = {name: dense(g) for name, g in zip(fast, grads, strict=True) if g is not None}
        return values.detach(), Comparison(weights, found)

    def _independent(self, batch: Any, values: Tensor) -> bool:
        """Whether the first examples, each alone, have the losses that they have in the batch."""
        for b in range(min(FIRST, len(values))):
            with self._same_random_numbers():
                state = torch.get_rng_state()
                alone, _ = self._losses(examples(batch, b, b + 1), 1)
                drawn = not torch.equal(state, torch.get_rng_state())
            if not same_losses(values[b : b + 1], alone.detach(), narrow=self.narrow):
                return drawn  # alone it may draw other random numbers
            if drawn:  # the next would draw what the first has drawn
                break
        return True

    # -- one example at a time ---------------------------------------------------------------------------------------

    def _add_slow(self, batch: Any, n: int, names: Sequence[str]) -> None:
        if not names:
            return
        chosen = [self.parameters[name] for name in names]
        with _requiring_grad(chosen):
            for b in range(n):
                example = batch if n == 1 else examples(batch, b, b + 1)
                try:
                    self._add_single(example, names)
                except RuntimeError as error:
                    if self.plain_backward or "use_reentrant" not in str(error):
                        raise
                    self.plain_backward = True
                    self._add_single(example, names)

    def _add_single(self, example: Any, names: Sequence[str]) -> None:
        values, weights = self._losses(example, 1)
        if not values.requires_grad:  # none of these parameters is used
            return
        chosen = [self.parameters[name] for name in names]
        gradients = _plain_backward if self.plain_backward else _autograd_grad
        for k in range(values.shape[1]):
            grads = gradients(values[:, k].sum(), chosen, _more(values, k))
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    self._weighted(name, _column(weights, k)).add(dense(grad)[None].to(wide(grad)))

    def _same_random_numbers(self) -> Any:
        """What is drawn inside will be drawn again afterwards."""
        return torch.random.fork_rng(devices={p.device for p in self.model.parameters() if p.device.type == "cuda"})

    def _losses(self, batch: Any, n: int) -> tuple[Tensor, Tensor | None]:  # [n, K], [n, K]
        with unwatched():
            batch = in_own_containers(batch, copies=self.copies)
        given = self.losses(self.model, batch)
        values, weights = given if isinstance(given, WeightedLosses) else (given, None)
        values = checked_losses(values, n, weights)
        self.saw_gradient |= values.requires_grad
        return values, weights

    def _warn(self) -> None:
        owners: dict[str, str] = {}
        for module_name, module in self.model.named_modules():
            for key, _ in module.named_parameters(recurse=False):
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


def _versions(batch: Any) -> list[int]:
    """Tensors that are changed in place get another."""
    with unwatched():
        return [t._version for t in tensors_in(batch) if not t.is_inference()]


def _column(weights: Tensor | None, k: int) -> Tensor | None:
    return None if weights is None else weights[:, k]


def _more(values: Tensor, k: int) -> bool:
    return k + 1 < values.shape[1]


def _autograd_grad(loss: Tensor, chosen: list[nn.Parameter], retain_graph: bool) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, chosen, allow_unused=True, retain_graph=retain_graph)


def _plain_backward(loss: Tensor, chosen: list[nn.Parameter], retain_graph: bool) -> Sequence[Tensor | None]:
    """The only backward that reentrant checkpoints know; it leaves gradients in the parameters."""
    if any(param._post_accumulate_grad_hooks for param in chosen):
        raise RuntimeError(
            "a parameter has a hook after the accumulation of its gradient, such as a step of an optimizer, which"
            " reentrant checkpoints would run: remove it, or use checkpoint(..., use_reentrant=False)"
        )
    before = [param.grad for param in chosen]
    for param in chosen:
        param.grad = None
    try:
        loss.backward(retain_graph=retain_graph)
        return [param.grad for param in chosen]
    finally:
        for param, grad in zip(chosen, before, strict=True):
            param.grad = grad


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
