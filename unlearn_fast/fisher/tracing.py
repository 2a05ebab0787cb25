"""Taps the functions in which parameters meet the data, in one forward and backward.

No parameter requires grad. Where a parameter, or an expression of parameters, enters a function whose result grows with
the batch, the result (or the parameter, expanded over the examples) passes through an autograd function that also takes
a trigger which requires grad. The loss gradient there thereby arrives example by example, and the ordinary weight
gradients, a third of a backward, are never computed.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlearn_fast.fisher.calls import Watch, all_tensors, replaced, unwatched
from unlearn_fast.fisher.expressions import Expression, region_of_view
from unlearn_fast.fisher.gradients import Dense, PerExampleGradient
from unlearn_fast.fisher.planning import CASTING, Decision, Kind, Places, Plan, Planner, expandable, rule_uses
from unlearn_fast.fisher.rules import RULES, Use, embedding_rows, module_rule

Deliver = Callable[[Sequence[Expression]], None]


class Trace(Watch):
    """One forward and its backwards over n examples, by a plan or together with the planner that makes one."""

    def __init__(
        self, model: nn.Module, parameters: Sequence[Expression], n: int, plan: Plan, planner: Planner | None = None
    ) -> None:
        super().__init__()
        self.model, self.n, self.plan, self.planner = model, n, plan, planner
        self.trigger = torch.zeros((), requires_grad=True)
        self.expressions = list(parameters)  # parents first
        self.known = {id(e.tensor): e for e in parameters}
        self.of_root = {str(e.key): [e] for e in parameters}
        for e in parameters:
            e.gradients = []  # another trace may have been left half done
        self.order: Counter[Hashable] = Counter()  # how often each key occurred
        self.uses: Counter[str] = Counter()  # of each parameter
        self.last: Any = None  # function that was called
        self.unplanned = False  # the model did what the plan does not hold: nothing of this forward may be used
        self.in_backward = False  # where functions run only because a checkpointed part is computed again

    @cached_property
    def module_names(self) -> dict[nn.Module, str]:
        return {module: name for name, module in self.model.named_modules()}

    # -- forward ---------------------------------------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.autograd.grad:
            self.unplanned |= self.planner is None and not self.plan.differentiated
            self.plan.differentiated = True
        places = self._places(args, kwargs)
        if not self.in_backward:
            self._step(func)
        if places and torch.is_grad_enabled():
            result = self._use(func, args, kwargs, places)
        else:
            result = func(*args, **kwargs)
        if self.planner is not None and not self.in_backward:
            self.planner.step(func, args, kwargs, result, places)
        return result

    def _step(self, func: Any) -> None:
        """From one function to the next the model must go as it went when it was checked; loops may run longer."""
        step, self.last = (self.last, func), func
        if self.planner is not None:
            self.plan.steps.add(step)
        elif step not in self.plan.steps:
            self.unplanned = True

    def _places(self, args: Any, kwargs: Any) -> Places:
        """Where expressions are among the arguments."""
        known = self.known
        places: Places = {}
        for i, value in enumerate(args):
            if id(value) in known:
                places[i] = known[id(value)]
            elif type(value) in (list, tuple):
                places |= {(i, j): known[id(v)] for j, v in enumerate(value) if id(v) in known}
        for name, value in kwargs.items():
            if id(value) in known:
                places[name] = known[id(value)]
        return places

    def _use(self, func: Any, args: Any, kwargs: Any, places: Places) -> Any:
        ranks = tuple([t.dim() for t in all_tensors(args) if id(t) not in self.known])
        key = (func, ranks, *[(place, e.key) for place, e in places.items()])
        order, decision = self._decision(key, lambda planner: planner.decide(key, func, args, kwargs, places))
        match decision.kind:
            case Kind.RULE:
                with unwatched():
                    uses = rule_uses(RULES[func], args, kwargs, places)
                return self._tap_result(func(*args, **kwargs), key, decision, uses)
            case Kind.BROADCAST:
                return self._tap_arguments(func, args, kwargs, key, decision, places)
            case Kind.EXPAND:
                (expression,) = places.values()
                return self._tap_expanded(func(*args, **kwargs), key, decision, expression)
            case Kind.DERIVE:
                return self._derive((key, order), func, args, kwargs, places)
        return func(*args, **kwargs)

    def _decision(self, key: Hashable, decide: Callable[[Planner], Decision]) -> tuple[int, Decision]:
        if self.in_backward:  # which call it repeats is not known, but all calls alike are
            order, found = 0, self.plan.find(key, len(self.plan.decisions.get(key, ())))
        else:
            order = self.order[key]
            self.order[key] += 1
            found = decide(self.planner) if self.planner is not None else self.plan.find(key, order)
        self.unplanned |= found is None
        return order, found or Decision(Kind.PASS)

    def module_call(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        tapped = self._use_module(module, args, kwargs, result)
        if self.planner is not None and not self.in_backward:
            self.planner.position += 1
        return tapped

    def _use_module(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        own = {name: self.known[id(p)] for name, p in module.named_parameters() if id(p) in self.known}
        first = next(iter(all_tensors(result)), None)
        if not own or first is None or not torch.is_grad_enabled():
            return None
        key = self.module_names[module], first.dim()
        _, decision = self._decision(key, lambda planner: planner.decide_module(key, module, result, own))
        if decision.kind is not Kind.RULE:
            return None
        uses = module_rule(module)(module, *args, **kwargs) or {}  # type: ignore[misc]
        tapped = self._tap_result(first, key, decision, {e: uses[name] for name, e in own.items() if name in uses})
        return tapped if isinstance(result, Tensor) else type(result)([tapped, *result[1:]])

    # -- taps ------------------------------------------------------------------------------------------------------

    def _tap_result(
        self, result: Tensor, key: Hashable, decision: Decision, uses: Mapping[Expression, Use] | None
    ) -> Tensor:
        front = decision.axis + result.dim()  # what is kept has its examples on the same axis, counted from the front
        kept = [t for use in (uses or {}).values() for t in use.keep]
        if (
            uses is None
            or not self._fits(result, front, key, decision.inner)
            or not all([self._fits(t, front) for t in kept])
        ):
            self.unplanned = True
            return result

        # Without `uses`: what autograd does not hold here is freed as the backward passes, as in an ordinary one.
        forms = [(expression, use.form, len(use.keep)) for expression, use in uses.items()]

        def receive(gradient: Tensor, *kept: Tensor) -> None:
            gradient, *parts = [self._split(t, front, decision.inner) for t in (gradient, *kept)]
            for expression, form, count in forms:
                own, parts = parts[:count], parts[count:]
                self._arrived(expression, form(gradient, *own))

        return self._tap(result, receive, uses, kept)

    def _tap_expanded(self, result: Tensor, key: Hashable, decision: Decision, expression: Expression) -> Tensor:
        front = decision.axis + result.dim()
        if not self._fits(result, front, key, decision.inner):
            self.unplanned = True
            return result
        shape, rank = expression.tensor.shape, result.dim()
        padded = [1] * (rank - len(shape)) + list(shape)

        def receive(gradient: Tensor) -> None:
            gradient = self._split(gradient, front, decision.inner)
            if gradient.dim() == rank:  # one entry an example
                gradient = gradient.unsqueeze(front + 1)
            gradient = gradient.sum_to_size(self.n, *padded)
            self._arrived(expression, Dense(gradient.reshape(self.n, *shape)))

        return self._tap(result, receive, [expression])

    def _tap_arguments(
        self, func: Any, args: Any, kwargs: Any, key: Hashable, decision: Decision, places: Places
    ) -> Any:
        axis = decision.axis
        data = [t for t in all_tensors((args, tuple(kwargs.values()))) if id(t) not in self.known and t.dim() >= -axis]
        size = max((t.shape[axis] for t in data), default=0)
        if size == 0 or not all(expandable(e, axis) for e in places.values()):
            self.unplanned = True
            return func(*args, **kwargs)
        expanded: dict[Any, Tensor] = {}
        for place, e in places.items():
            shape = [1] * (-axis - e.tensor.dim()) + list(e.tensor.shape)
            shape[axis] = size
            expanded[place] = self._tap_expanded(e.tensor.expand(shape), key, decision, e)
        args, kwargs = replaced(args, kwargs, expanded)
        return func(*args, **kwargs)

    def _tap(
        self,
        value: Tensor,
        receive: Callable[..., None],
        expressions: Iterable[Expression],
        kept: Sequence[Tensor] = (),
    ) -> Tensor:
        if not self.in_backward:
            for e in expressions:
                for root in e.roots:
                    self.uses[root] += 1
        return _Tap.apply(self.trigger, value, self, receive, *kept)

    def _fits(self, t: Tensor, axis: int, key: Hashable = None, inner: bool | None = False) -> bool:
        """Whether the axis can be divided among the examples; with a key, into as many entries as were checked, in an
        order that is known."""
        if not 0 <= axis < t.dim() or t.shape[axis] % self.n:
            return False
        if key is None or self.in_backward:
            return True
        entries = t.shape[axis] // self.n
        if self.planner is not None:
            self.plan.entries[key].add(entries)
            return True
        return entries in self.plan.entries[key] and (entries == 1 or inner is not None)

    def _split(self, t: Tensor, axis: int, inner: bool | None = False) -> Tensor:
        """The examples in front: an axis of n moves there; of n * k (`inner`: k * n), the k stay where they were."""
        if t.shape[axis] == self.n:
            return t.movedim(axis, 0) if axis else t
        return t.unflatten(axis, (-1, self.n) if inner else (self.n, -1)).movedim(axis + bool(inner), 0)

    # -- expressions -----------------------------------------------------------------------------------------------

    def _derive(self, key: Hashable, func: Any, args: Any, kwargs: Any, places: Places) -> Any:
        leaves = {place: e.tensor.detach().requires_grad_() for place, e in places.items()}
        inputs = {place: t.clone() for place, t in leaves.items()} if kwargs.get("inplace") else leaves
        leaf_args, leaf_kwargs = replaced(args, kwargs, inputs)
        value = func(*leaf_args, **leaf_kwargs)
        parents = [(e, leaves[place]) for place, e in places.items()]
        push = self._push_rows(parents[0][0], *args, **kwargs) if func is F.embedding else None

        def expression(index: int, part: Any) -> Any:
            if not isinstance(part, Tensor) or not part.requires_grad:
                return part
            region = None
            if len(parents) == 1:
                (parent, leaf), *_ = parents
                casts = func in CASTING and part.shape == leaf.shape
                region = parent.region if casts else region_of_view(parent, leaf, part)
            made = Expression((key, index), part.detach(), parents, part, push, region)
            self.expressions.append(made)
            for root in made.roots:
                self.of_root[root].append(made)
            self.known[id(made.tensor)] = made
            return made.tensor

        if type(value) in (tuple, list):
            return type(value)(expression(i, part) for i, part in enumerate(value))
        return expression(0, value)

    def _push_rows(
        self, weight: Expression, tokens: Tensor, _: Any, padding_idx: int | None = None, *others: Any, **options: Any
    ) -> Callable[[PerExampleGradient], PerExampleGradient]:
        """An embedding of tokens that all examples share: each example's gradient goes to the same rows."""
        shared, rows = tokens.expand(self.n, *tokens.shape), weight.tensor
        # Without self: the expression that holds this would keep the whole pass, and its memory, in a cycle.
        return lambda g: embedding_rows(shared, g.dense(0, len(shared)), rows, padding_idx)

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, deliver: Deliver, *, retain_graph: bool = False) -> None:
        """Runs the backward. Each connected set of expressions is delivered as soon as its gradients are complete."""
        self.deliver, self.waiting = deliver, self.uses.copy()
        self.joint = {name for e in self.expressions if len(e.roots) > 1 for name in e.roots}
        self.in_backward = True
        try:
            if loss.requires_grad:
                torch.autograd.backward([loss], inputs=[self.trigger], retain_graph=retain_graph)
        finally:
            self.in_backward = False
        with unwatched(), torch.no_grad():
            while late := next((e for e in self.expressions if e.gradients), None):  # some uses had no path to the loss
                roots = _connected(late.roots, self.expressions)
                self._settle([e for e in self.expressions if e.roots & roots])

    def _arrived(self, expression: Expression, gradient: PerExampleGradient) -> None:
        expression.gradients.append(gradient)
        for root in expression.roots:
            self.waiting[root] -= 1
        if len(expression.roots) == 1 and not self.waiting[root] and root not in self.joint:
            self._settle(self.of_root[root])

    def _settle(self, expressions: Sequence[Expression]) -> None:
        self.deliver(expressions)
        for e in expressions:
            e.gradients = []


def _connected(roots: Iterable[str], expressions: Sequence[Expression]) -> set[str]:
    """The parameters that expressions join with these, directly or through others."""
    found = set(roots)
    while True:
        more = found.union(*(e.roots for e in expressions if e.roots & found))
        if more == found:
            return found
        found = more


class _Tap(torch.autograd.Function):
    """Identity whose backward hands over the loss gradient, with what was kept for it."""

    @staticmethod
    def forward(
        ctx: Any, trigger: Tensor, value: Tensor, trace: Trace, receive: Callable[..., None], *kept: Tensor
    ) -> Tensor:
        # Kept through the context: an in-place change of it afterwards is then an error, not a wrong result.
        ctx.save_for_backward(*kept)
        ctx.trace, ctx.receive, ctx.nothing = trace, receive, [None] * (2 + len(kept))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # also where nothing is received: what changed in place is an error
        if ctx.trace.in_backward:  # not in one that the losses run themselves
            with unwatched():
                ctx.receive(gradient, *kept)
        return None, gradient, *ctx.nothing
