"""Decides what must be done where parameters enter functions in a forward, and remembers it.

The forward is first run with one example more, and the shapes are noted: the axis that has grown holds the examples. A
plan made from that serves all later batches in which the model does the same.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_fast.fisher.calls import Watch, all_tensors, argument_names, is_in_place, replaced, shapes_of
from unlearn_fast.fisher.expressions import Expression
from unlearn_fast.fisher.rules import RULES, Rule, Use

Place = int | str | tuple[int, int]  # of an argument: position, name, or position and index in the list there
Places = dict[Place, Expression]


def _named(*names: str) -> set[Any]:
    """The functions of these names: torch.add, Tensor.add, Tensor.add_, Tensor.__add__, __radd__ and __iadd__."""
    forms = [form for n in names for form in (n, f"{n}_", f"__{n}__", f"__r{n}__", f"__i{n}__")]
    return {getattr(place, form) for place in (torch, Tensor) for form in forms if hasattr(place, form)}


# Where a parameter meets the data by broadcasting: it is expanded over the examples before.
BROADCASTING = _named(
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "truediv", "true_divide", "pow", "where",
    "maximum", "minimum", "lerp", "addcmul", "addcdiv",
) | {F.scaled_dot_product_attention}  # fmt: skip
# Where it is itself expanded over the batch.
EXPANDING = _named("expand", "expand_as", "broadcast_to", "repeat", "tile")
# Where nothing changes but the dtype.
CASTING = _named("to", "type", "type_as", "float", "double", "half", "bfloat16")
# Results whose place in the batch depends on the data: an attribution to examples that held once may not hold again.
ROUTING = _named(
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "nonzero_static", "repeat_interleave",
    "sort", "argsort", "msort", "topk",
) | {torch._VF._pack_padded_sequence, F.one_hot}  # fmt: skip
# Numbers that Python reads, or brings: of a batch's data they may be lengths, by which examples are then packed.
READING = _named("tolist", "item", "int", "index", "numpy", "array")
BRINGING = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}


class Kind(Enum):
    """What a function does with the expressions that enter it."""

    RULE = "rule"
    BROADCAST = "broadcast"
    EXPAND = "expand"
    DERIVE = "derive"  # it makes another expression of them
    PASS = "pass"  # no gradient comes of it: a shape, a dtype, a detached value
    OPAQUE = "opaque"  # it has no rule


class Decision(NamedTuple):
    kind: Kind
    axis: int = 0  # of the result that holds the examples, counted from the end
    # Whether that axis is [k * n], not [n * k]: k entries an example, the example changing fastest. None: not known.
    inner: bool | None = False

    def known_from(self, before: "Decision") -> "Decision":
        """The same with the order of entries that was found before, where it is not known."""
        return self._replace(inner=before.inner) if self.inner is None and self[:2] == before[:2] else self


class Plan:
    """Decisions by function, expressions and order; and what else was learnt from the batch they were made on."""

    def __init__(self) -> None:
        self.decisions: dict[Hashable, list[Decision]] = defaultdict(list)
        self.entries: dict[Hashable, set[int]] = defaultdict(set)  # how many an example had on its axis
        self.opaque: dict[str, str] = {}  # parameter -> why it has no rule
        self.served: dict[str, set[str]] = defaultdict(set)  # parameter -> the rules that serve it
        self.differentiated = False  # whether the losses took gradients themselves, as a gradient penalty does
        self.routed = False  # whether where examples are depends on the data: every batch must be checked
        self.steps: set[tuple[Any, Any]] = set()  # from which function to which the model went

    def learn(self, other: "Plan") -> None:
        """Takes over what a later check found."""
        for key, found in other.decisions.items():
            known = self.decisions[key]
            merged = [new.known_from(old) for old, new in zip(known, found, strict=False)]
            self.routed |= any(old != new for old, new in zip(known, merged, strict=False) if old.inner is not None)
            self.decisions[key] = [*merged, *found[len(merged) :], *known[len(merged) :]]
        self.steps |= other.steps
        for key, entries in other.entries.items():
            self.entries[key] |= entries
        for name, rules in other.served.items():
            self.served[name] |= rules
        self.opaque.update(other.opaque)
        self.differentiated |= other.differentiated
        self.routed |= other.routed

    def find(self, key: Hashable, order: int) -> Decision | None:
        known = self.decisions.get(key)
        if not known:
            return None
        if order < len(known):
            return known[order]
        return known[-1] if len(set(known)) == 1 else None  # a loop that runs longer than before


class Note(NamedTuple):
    """What is noted of a call."""

    what: Any  # the function or module
    shapes: list[tuple[int, ...]]
    inner: bool | None  # of the first result's first axis, see `Decision`


class Record(Watch):
    """Notes the shapes of every result in a forward over m examples, of which the first and the last are the same."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.m = m
        self.calls: list[Note] = []
        self.narrow = False  # whether anything was computed in 16 bits, as under autocast

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        inner: bool | None = False
        if func in RULES or func in BROADCASTING:
            inner = _is_inner(result, self.m)
        self.narrow |= any(t.dtype in (torch.bfloat16, torch.float16) for t in all_tensors(result))
        self.calls.append(Note(func, shapes_of(result), inner))
        return result

    def module_call(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        first = next(iter(all_tensors(result)), None)
        self.calls.append(Note(module, shapes_of(result), _is_inner(first, self.m)))


def _is_inner(result: Any, m: int) -> bool | None:
    """Whether the first axis, of m * k entries, has those of the first and of the last example, which are equal, where
    [k * m] has them rather than where [m * k] has them. None where that cannot be told, or makes no difference."""
    if not isinstance(result, Tensor) or result.dim() == 0 or len(result) % m or len(result) in (0, m):
        return None
    t = result.detach()
    far, near = t.unflatten(0, (m, -1)), t.unflatten(0, (-1, m)).transpose(0, 1)
    apart_far, apart_near = (float((rows[0] - rows[-1]).abs().sum()) for rows in (far, near))
    return None if apart_far == apart_near else apart_near < apart_far


class Planner:
    """Makes the decisions of a plan, in step with the record of the same forward over n + 1 examples."""

    def __init__(self, plan: Plan, record: Record, n: int) -> None:
        self.plan, self.calls, self.n = plan, record.calls, n
        self.position = 0
        self.routed: dict[int, Tensor] = {}  # results of data-dependent indexing, and what was made of them
        self.read = False  # whether Python has read numbers

    def decide(self, key: Hashable, func: Any, args: Any, kwargs: Any, places: Places) -> Decision:
        decision, told = self._decide(func, args, kwargs, places)
        self.plan.routed |= self.read and decision.kind is not Kind.OPAQUE and self._packed(decision)
        for name in {name for e in places.values() for name in e.roots}:
            if decision.kind is Kind.OPAQUE:
                self.plan.opaque[name] = told
            elif told:
                self.plan.served[name].add(told)
        self.plan.decisions[key].append(decision)
        return decision

    def _decide(self, func: Any, args: Any, kwargs: Any, places: Places) -> tuple[Decision, str]:
        """With the name of the rule, or why there is none."""
        name = getattr(func, "__name__", str(func))
        in_place = is_in_place(func) or "out" in kwargs
        if in_place:
            result: Any = args[0]
        else:
            with torch.no_grad():
                result = func(*args, **{**kwargs, "inplace": False} if "inplace" in kwargs else kwargs)
        shapes = shapes_of(result)
        if not shapes:
            return Decision(Kind.PASS), ""
        axes = self._batch_axes(func, shapes)
        if axes is None:
            return Decision(Kind.OPAQUE), "the model runs differently with one example more"
        if all(axis is None for axis in axes):
            if in_place and 0 in places:
                return Decision(Kind.OPAQUE), f"the model changes it itself, by {name}"
            own = {id(e.tensor) for e in places.values()}
            if not in_place and any(t.requires_grad for t in all_tensors((args, *kwargs.values())) if id(t) not in own):
                return Decision(Kind.OPAQUE), f"the result of {name} does not grow with the batch"
            return Decision(Kind.PASS if in_place else Kind.DERIVE), RULES[func].__name__ if func in RULES else ""
        axis = axes[0]
        if axis is None or axis == MIXED or len(axes) > 1:
            return Decision(Kind.OPAQUE), f"the result of {name} has no axis for the examples alone"
        if func in RULES and rule_uses(RULES[func], args, kwargs, places) is not None:
            return Decision(Kind.RULE, axis, self._inner(axis, shapes[0])), RULES[func].__name__
        if func in BROADCASTING and all(not isinstance(p, tuple) and expandable(e, axis) for p, e in places.items()):
            return Decision(Kind.BROADCAST, axis, self._inner(axis, shapes[0])), "broadcast"
        if func in EXPANDING and list(places) == [0] and _only_expands(places[0], shapes[0], axis, self.n):
            return Decision(Kind.EXPAND, axis), "broadcast"
        if not in_place and not _carries_gradient(func, args, kwargs, places):
            return Decision(Kind.PASS), ""
        return Decision(Kind.OPAQUE), f"{name} has no rule"

    def decide_module(self, key: Hashable, module: Any, result: Any, own: Mapping[str, Expression]) -> Decision:
        """For a module with a rule of its own, whose first result counts. A parameter that the rule leaves out is found
        when the plan is checked."""
        kind = type(module).__name__
        axes = self._batch_axes(module, shapes_of(result))
        axis = axes[0] if axes else None
        placed = axis is not None and axis != MIXED
        for e in own.values():
            if placed:
                self.plan.served[str(e.key)].add(kind)
            else:
                self.plan.opaque[str(e.key)] = f"the result of {kind} has no axis for the examples alone"
        decision = Decision(Kind.OPAQUE)
        if axis is not None and placed:
            decision = Decision(Kind.RULE, axis, self._inner(axis, shapes_of(result)[0]))
        self.plan.decisions[key].append(decision)
        return decision

    def _batch_axes(self, what: Any, shapes: Sequence[tuple[int, ...]]) -> list[int | None] | None:
        """The axis of each result that holds the examples; None if the two forwards are out of step."""
        note = self.calls[self.position] if self.position < len(self.calls) else None
        if note is None or note.what != what or len(note.shapes) != len(shapes):
            return None
        return [_batch_axis(a, b, self.n) for a, b in zip(shapes, note.shapes, strict=True)]

    def _packed(self, decision: Decision) -> bool:
        """Whether the axis of the examples has several entries for each, whose number may vary between examples."""
        if decision.kind not in (Kind.RULE, Kind.BROADCAST, Kind.EXPAND):
            return False
        return self.calls[self.position].shapes[0][decision.axis] != self.n + 1

    def _inner(self, axis: int, shape: tuple[int, ...]) -> bool | None:
        return self.calls[self.position].inner if axis == -len(shape) else False

    def step(self, func: Any, args: Any, kwargs: Any, result: Any, places: Places) -> None:
        """On to the next call; keeps track of what data-dependent indexing made."""
        self.position += 1
        brought = func in BRINGING and any(t.dim() and not t.is_floating_point() for t in all_tensors(result))
        self.read |= brought or func in READING
        given = all_tensors((args, tuple(kwargs.values())))
        routed = any(id(t) in self.routed for t in given)
        if routed and places:
            self.plan.routed = True
        by_mask = _holds_mask(args[1]) if func is Tensor.__getitem__ else func is torch.where and len(args) == 1
        if routed or by_mask or func in ROUTING:
            self.routed.update((id(t), t) for t in all_tensors(result))


MIXED = 1  # no axis: they are counted from the end


def _batch_axis(shape: Sequence[int], longer: Sequence[int], n: int) -> int | None:
    """The axis that grows with the batch, given the shapes for n and for n + 1 examples; None where none does."""
    if len(shape) != len(longer):
        return MIXED
    grown = [i for i, (a, b) in enumerate(zip(shape, longer, strict=True)) if a != b]
    if not grown:
        return None
    if len(grown) > 1 or shape[grown[0]] * (n + 1) != longer[grown[0]] * n:
        return MIXED
    return grown[0] - len(shape)


def rule_uses(rule: Rule, args: Any, kwargs: Any, places: Places) -> dict[Expression, Use] | None:
    """The use of each expression; None where the rule does not know one of them."""
    names, uses = argument_names(rule), rule(*args, **kwargs) or {}
    found: dict[Expression, Use] = {}
    for place, expression in places.items():
        name = names[place] if isinstance(place, int) and place < len(names) else place
        if name not in uses or expression in found:
            return None
        found[expression] = uses[name]  # type: ignore[index]
    return found


def expandable(expression: Expression, axis: int) -> bool:
    """Whether nothing but 1 stands where the examples shall be."""
    t = expression.tensor
    return t.dim() < -axis or t.shape[axis] == 1


def _only_expands(expression: Expression, shape: tuple[int, ...], axis: int, n: int) -> bool:
    """Whether the result is the expression over and over: on the examples' axis, and on axes of 1."""
    own = (1,) * (len(shape) - expression.tensor.dim()) + tuple(expression.tensor.shape)
    apart = [i for i in range(-len(shape), 0) if i != axis]
    return own[axis] in (1, shape[axis] // n) and all(own[i] in (1, shape[i]) for i in apart)


def _carries_gradient(func: Any, args: Any, kwargs: Any, places: Mapping[Place, Expression]) -> bool:
    leaves = {place: e.tensor.detach().requires_grad_() for place, e in places.items()}
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
    try:
        args, kwargs = replaced(plain, kwargs, leaves)
        return any(t.requires_grad for t in all_tensors(func(*args, **kwargs)))
    except Exception:  # it has run before: what fails is the experiment
        return True


def _holds_mask(index: Any) -> bool:
    return any(t.dtype in (torch.bool, torch.uint8) for t in all_tensors(index))
