"""What a model makes of its parameters before they meet the data, and the way back for per-example gradients.

An expression is a parameter, or a value computed from parameters alone: `weight.t()`, `1 + weight`, a weight-normed
weight, position embeddings looked up for positions that all examples share. Per-example gradients arrive where an
expression is used. Where every use is of the parameter itself, of a view or of a cast of it, they are added in their
own form; everything else is pulled back by autograd, some examples at a time.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_fast.fisher.gradients import Moments, PerExampleGradient, total, wide
from unlearn_fast.ops._checks import may_overlap


class Region(NamedTuple):
    """The part of a parameter that a view shows."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, t: Tensor) -> Tensor:
        """The same part of a contiguous tensor of the parameter's shape."""
        if self.shape == t.shape and self.offset == 0 and self.strides == t.stride():
            return t
        return t.as_strided(self.shape, self.strides, t.storage_offset() + self.offset)


class Expression:
    """A parameter, or a value computed from parameters."""

    def __init__(
        self,
        key: Hashable,  # the same in every pass
        tensor: Tensor,  # what the model works with; no graph leads from it to the parameters
        parents: Sequence[tuple["Expression", Tensor]] = (),  # with the leaf that `value` was computed from
        value: Tensor | None = None,
        push: Callable[[PerExampleGradient], PerExampleGradient] | None = None,
        region: Region | None = None,
    ) -> None:
        self.key, self.tensor, self.parents, self.value, self.push, self.region = (
            key, tensor, parents, value, push, region,
        )  # fmt: skip
        self.roots: frozenset[str] = (
            frozenset().union(*(p.roots for p, _ in parents)) if parents else frozenset([str(key)])
        )
        self.gradients: list[PerExampleGradient] = []

    @classmethod
    def of_parameter(cls, name: str, param: Tensor) -> "Expression":
        contiguous = param if param.is_contiguous() else torch.empty(param.shape, device="meta")
        return cls(name, param, region=Region(param.shape, contiguous.stride(), 0))

    def pull_back(self, gradients: Tensor) -> list[Tensor]:
        """[m, *own shape] -> [m, *shape] for each parent."""
        assert self.value is not None
        leaves = [leaf for _, leaf in self.parents]
        flags: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        try:
            return list(torch.autograd.grad(self.value, leaves, gradients, is_grads_batched=True, **flags))
        except RuntimeError:  # an operation that cannot be batched
            single = [torch.autograd.grad(self.value, leaves, g, **flags) for g in gradients]
            return [torch.stack(of_leaf) for of_leaf in zip(*single, strict=True)]


def region_of_view(parent: Expression, leaf: Tensor, value: Tensor) -> Region | None:
    """The region that `value`, a view of `leaf`, shows; None if it is no view, or of memory in another order."""
    if parent.region is None or parent.region.strides != leaf.stride():
        return None
    if value.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr():
        return None
    if may_overlap(value.shape, value.stride()):  # several elements are one: their gradients must be added first
        return None
    offset = parent.region.offset + value.storage_offset() - leaf.storage_offset()
    return Region(tuple(value.shape), tuple(value.stride()), int(offset))


class PulledBack(PerExampleGradient):
    """The gradients of one parameter from all the expressions that were made of it."""

    def __init__(self, root: Expression, expressions: Sequence[Expression]) -> None:
        self.root, self.expressions = root, [e for e in expressions if root.key in e.roots]
        self.n = next(g.n for e in self.expressions for g in e.gradients)
        self.shape = tuple(root.tensor.shape)
        self._largest = max(e.tensor.numel() for e in self.expressions)

    def sources(self) -> list[Tensor]:
        return [t for e in self.expressions for g in e.gradients for t in g.sources()]

    def dense(self, start: int, stop: int) -> Tensor:
        found: dict[int, Tensor] = {}
        dtype = wide(self.root.tensor)

        def add(to: Expression, gradients: Tensor) -> None:
            before = found.get(id(to))
            found[id(to)] = gradients if before is None else before + gradients

        for e in reversed(self.expressions):  # children come after their parents
            for gradient in e.gradients:
                add(e, gradient.dense(start, stop).reshape(stop - start, *e.tensor.shape))
            if e.parents and id(e) in found:
                pulled = e.pull_back(found.pop(id(e)).to(e.tensor.dtype))
                for (parent, _), gradients in zip(e.parents, pulled, strict=True):
                    if self.root.key in parent.roots:
                        add(parent, gradients)
        return found[id(self.root)].to(dtype)

    def _example_size(self) -> int:
        return self._largest


Parts = list[tuple[Region, PerExampleGradient]]


def gradients_of(expressions: Sequence[Expression]) -> Iterator[tuple[str, Parts]]:
    """For each parameter of a connected set of expressions: its gradients, in disjoint regions of it."""
    for e in reversed(expressions):
        if e.push is not None and e.gradients:
            (parent, _), *_ = e.parents
            parent.gradients += [e.push(g) for g in e.gradients]
            e.gradients = []
    if len(expressions) == 1:  # a parameter that is used as it is
        (root,) = expressions
        assert root.region is not None
        yield str(root.key), [(root.region, total(root.gradients))] if root.gradients else []
        return
    for root in (e for e in expressions if not e.parents):
        own = [e for e in expressions if root.key in e.roots and e.gradients]
        regions: dict[Region, list[PerExampleGradient]] = {}
        whole = root.region
        assert whole is not None
        for e in own:
            if e.region is None:
                regions = {}
                break
            regions.setdefault(e.region, []).extend(e.gradients)
        if own and (not regions or not _disjoint(tuple(regions), root.tensor.shape)):
            yield str(root.key), [(whole, PulledBack(root, expressions))]
        else:
            yield str(root.key), [(region, total(uses)) for region, uses in regions.items()]


@lru_cache(maxsize=4096)
def _disjoint(regions: tuple[Region, ...], shape: tuple[int, ...]) -> bool:
    if len(regions) == 1:
        return True
    marks = torch.zeros(shape, dtype=torch.bool)
    for region in regions:
        part = region.of(marks)
        if bool(part.any()):
            return False
        part.fill_(True)
    return True


def add_moments(moments: Moments, parts: Parts) -> None:
    for region, gradient in parts:
        gradient.add_to(moments.map(region.of))


def weighted_sum(like: Tensor, weights: Tensor, parts: Parts) -> Tensor:
    """sum_b w_b G_b of a whole parameter, in the weights' dtype."""
    out = torch.zeros(like.shape, dtype=weights.dtype, device=like.device)
    for region, gradient in parts:
        region.of(out).add_(gradient.weighted_sum(weights).view(region.shape))
    return out
