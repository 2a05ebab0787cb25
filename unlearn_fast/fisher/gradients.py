"""The forms that the per-example gradients of a tensor take, and how each adds its moments without becoming [B, P].

A gradient here stands for G_b, b = 0 .. n - 1, all of one shape. `add_to(moments)` adds `sum_b w_b G_b^2`, and what
else is asked for; `weighted_sum(w)` is `sum_b w_b G_b`; and `dense(start, stop)` is some of the G_b themselves.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unlearn_fast.ops.sum_grad_squared_conv import sum_grad_squared_conv_
from unlearn_fast.ops.sum_grad_squared_embedding import sum_grad_squared_embedding_
from unlearn_fast.ops.sum_grad_squared_linear import sum_grad_squared_linear_
from unlearn_fast.ops.sum_grad_squared_scale import sum_grad_squared_scale_

WORKSPACE_BYTES = 32 << 20


def wide(t: Tensor) -> torch.dtype:
    """What moments of the tensor are summed in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dense(gradient: Tensor) -> Tensor:
    """As autograd gives it, which is sparse for some embeddings."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


@dataclass
class Moments:
    """Running sums over examples, each shaped like the parameter."""

    second: Tensor  # sum w_b G_b^2, or sum w_b |G_b|
    first: Tensor | None = None  # sum w_b G_b
    absolute: bool = False
    weights: Tensor | None = None  # [B]; None: ones

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the operators that say what to add."""
        return {"first": self.first, "absolute": self.absolute, "weights": self.weights}

    def map(self, view: Callable[[Tensor], Tensor]) -> "Moments":
        second = view(self.second)
        if second is self.second:
            return self
        return replace(self, second=second, first=None if self.first is None else view(self.first))

    def shaped(self, shape: Sequence[int]) -> "Moments":
        return self if self.second.shape == shape else self.map(lambda t: t.view(shape))

    def of_examples(self, start: int, stop: int) -> "Moments":
        return self if self.weights is None else replace(self, weights=self.weights[start:stop])

    def add(self, gradients: Tensor, rows: Tensor | None = None) -> None:
        """Adds the moments of dense gradients [m, *shape], m examples; with `rows`, G_b is one of these rows."""
        powers = gradients.abs() if self.absolute else gradients.square()
        for total, values in ((self.second, powers), (self.first, gradients)):
            if total is None:
                continue
            values = values.to(total.dtype)
            if self.weights is not None:
                values = values * self.weights.view(-1, *[1] * (values.dim() - 1))
            if rows is None:
                total.add_(values.sum(0))
            else:
                total.index_add_(0, rows, values.flatten(0, 1))


class PerExampleGradient:
    """By default everything is done some examples at a time, in a bounded workspace."""

    n: int
    shape: tuple[int, ...]

    def sources(self) -> list[Tensor]:
        """The loss gradients that it is made of."""
        raise NotImplementedError

    def dense(self, start: int, stop: int) -> Tensor:  # [stop - start, *shape]
        raise NotImplementedError

    def weighted_sum(self, weights: Tensor) -> Tensor:  # [n] -> shape
        return sum(
            torch.einsum("b,b...->...", weights[i:j], self.dense(i, j).to(weights.dtype)) for i, j in self._steps()
        )  # type: ignore[return-value]

    def add_to(self, moments: Moments) -> None:
        for start, stop in self._steps():
            moments.of_examples(start, stop).add(self.dense(start, stop))

    def _steps(self) -> Iterator[tuple[int, int]]:
        step = max(1, WORKSPACE_BYTES // (8 * max(1, self._example_size())))
        for start in range(0, self.n, step):
            yield start, min(self.n, start + step)

    def _example_size(self) -> int:
        """Numbers that an example takes while it is worked on."""
        return math.prod(self.shape)


class Dense(PerExampleGradient):
    """G_b = values[b]: small parameters, whose uses were expanded over the examples."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.n, self.shape = values, values.shape[0], values.shape[1:]

    def sources(self) -> list[Tensor]:
        return [self.values]

    def dense(self, start: int, stop: int) -> Tensor:
        return _between(self.values, start, stop)


class Scaled(PerExampleGradient):
    """G_b[c] = sum_t grads[b, t, c] * inputs[b, t, c]: weights of norms, and with no inputs biases.

    With `make`, the inputs are what it makes of `inputs`, some examples at a time.
    """

    def __init__(
        self,
        inputs: Tensor | None,  # [n, T, C], or [n, ...] with `make`
        grads: Tensor,  # [n, T, C]
        shape: Sequence[int],
        make: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.inputs, self.grads, self.make = inputs, grads, make
        self.n, self.shape = grads.shape[0], tuple(shape)

    def sources(self) -> list[Tensor]:
        return [self.grads]

    def dense(self, start: int, stop: int) -> Tensor:
        grads, inputs = self.grads[start:stop], self._inputs(start, stop)
        products = grads if inputs is None else grads.to(wide(grads)) * inputs
        return products.sum(1, dtype=wide(grads)).reshape(-1, *self.shape)

    def add_to(self, moments: Moments) -> None:
        flat = moments.shaped(self.grads.shape[-1:])
        for start, stop in self._steps() if self.make else [(0, self.n)]:
            part = flat.of_examples(start, stop)
            inputs, grads = _same_dtype(self._inputs(start, stop), _between(self.grads, start, stop))
            sum_grad_squared_scale_(part.second, inputs, grads, **part.options)

    def _inputs(self, start: int, stop: int) -> Tensor | None:
        part = None if self.inputs is None else _between(self.inputs, start, stop)
        return part if part is None or self.make is None else self.make(part)

    def _example_size(self) -> int:
        return math.prod(self.grads.shape[1:])


class Outer(PerExampleGradient):
    """G_b = sum_t grads[b, t]^T inputs[b, t], of shape [O, I]: the weight of a linear layer."""

    def __init__(self, inputs: Tensor, grads: Tensor) -> None:  # [n, T, I], [n, T, O]
        self.inputs, self.grads = _same_dtype(inputs, grads)
        self.n, self.shape = grads.shape[0], (grads.shape[-1], inputs.shape[-1])

    def sources(self) -> list[Tensor]:
        return [self.grads]

    def dense(self, start: int, stop: int) -> Tensor:
        dtype = wide(self.grads)
        return self.grads[start:stop].to(dtype).transpose(1, 2) @ self.inputs[start:stop].to(dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        weighted = self.grads.to(weights.dtype) * weights.view(-1, 1, 1)
        return weighted.flatten(0, 1).T @ self.inputs.flatten(0, 1).to(weights.dtype)

    def add_to(self, moments: Moments) -> None:
        matrix, inputs, grads = moments.shaped(self.shape), self.inputs, self.grads
        if matrix.second.stride(0) == 1 < matrix.second.stride(1):  # a transposed weight: its rows lie in memory
            matrix, inputs, grads = matrix.map(Tensor.t), grads, inputs
        sum_grad_squared_linear_(matrix.second, inputs, grads, **matrix.options)


class Rows(PerExampleGradient):
    """G_b[v] = sum of grads[b, t] over the positions t where tokens[b, t] = v: the weight of an embedding."""

    def __init__(self, tokens: Tensor, grads: Tensor, rows: int) -> None:  # [n, T], negative: none; [n, T, H]
        self.tokens, self.grads, self.rows = tokens, grads, rows
        self.n, self.shape = len(grads), (rows, grads.shape[-1])

    def sources(self) -> list[Tensor]:
        return [self.grads]

    def dense(self, start: int, stop: int) -> Tensor:
        grads = self.grads[start:stop].to(wide(self.grads))
        out = grads.new_zeros(len(grads) * (self.rows + 1), grads.shape[-1])
        tokens = self.tokens[start:stop].long()
        place = torch.where(tokens < 0, self.rows, tokens)  # a row for what is ignored
        place = place + (self.rows + 1) * torch.arange(len(grads), device=grads.device).unsqueeze(1)
        out.index_add_(0, place.flatten(), grads.flatten(0, 1))
        return out.view(len(grads), self.rows + 1, -1)[:, : self.rows]

    def weighted_sum(self, weights: Tensor) -> Tensor:
        weighted = self.grads.to(weights.dtype) * weights.view(-1, 1, 1)
        return Rows(self.tokens.reshape(1, -1), weighted.flatten(0, 1)[None], self.rows).dense(0, 1)[0]

    def add_to(self, moments: Moments) -> None:
        sum_grad_squared_embedding_(moments.second, self.tokens, self.grads, **moments.options)


class Convolution(PerExampleGradient):
    """The weight of a convolution; with several images an example, their gradients are added."""

    def __init__(self, inputs: Tensor, grads: Tensor, shape: Sequence[int], **geometry: Any) -> None:
        self.inputs, self.grads = _same_dtype(inputs, grads)  # [n, C, *in], [n, O, *positions], or [n, W, ...] both
        self.geometry, self.n, self.shape = geometry, len(grads), tuple(shape)

    def sources(self) -> list[Tensor]:
        return [self.grads]

    def dense(self, start: int, stop: int) -> Tensor:
        return torch.stack([self._gradient(self.inputs[b], self.grads[b]) for b in range(start, stop)])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        grads = self.grads.to(weights.dtype) * weights.view(-1, *[1] * (self.grads.dim() - 1))
        images = self.grads.dim() - len(self.shape)  # axes in front of the channels
        return self._gradient(self.inputs.to(weights.dtype).flatten(0, images), grads.flatten(0, images))

    def add_to(self, moments: Moments) -> None:
        sum_grad_squared_conv_(moments.second, self.inputs, self.grads, **self.geometry, **moments.options)

    def _gradient(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Of all images together, as in an ordinary backward."""
        spatial = len(self.shape) - 2
        inputs, grads = (t.reshape(-1, *t.shape[-spatial - 1 :]).to(wide(t)) for t in (inputs, grads))
        weight = inputs.new_empty(self.shape)
        geometry = [self.geometry[name] for name in ("stride", "padding", "dilation")]
        groups = self.geometry["groups"]
        needs = [False, True, False]
        args = (grads, inputs, weight, None, *geometry, False, [0] * spatial, groups, needs)
        return torch.ops.aten.convolution_backward(*args)[1]


class Total(PerExampleGradient):
    """The sum of several uses: a parameter has ONE gradient an example, summed before it is squared."""

    def __init__(self, uses: Sequence[PerExampleGradient]) -> None:
        self.uses, self.n, self.shape = uses, uses[0].n, uses[0].shape

    def sources(self) -> list[Tensor]:
        return [t for use in self.uses for t in use.sources()]

    def dense(self, start: int, stop: int) -> Tensor:
        first, *others = (use.dense(start, stop) for use in self.uses)
        return sum(others, first)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        first, *others = (use.weighted_sum(weights) for use in self.uses)
        return sum(others, first)


def total(uses: Sequence[PerExampleGradient]) -> PerExampleGradient:
    """The sum of the uses, in a cheaper form than `Total` where there is one."""
    if len(uses) == 1:
        return uses[0]
    if all(isinstance(use, Outer) for use in uses):
        return Outer(_joined([use.inputs for use in uses]), _joined([use.grads for use in uses]))  # type: ignore
    if all(isinstance(use, Rows) for use in uses):
        return Rows(_joined([u.tokens for u in uses]), _joined([u.grads for u in uses]), uses[0].rows)  # type: ignore
    heads, embeddings = ([use for use in uses if isinstance(use, kind)] for kind in (Outer, Rows))
    if heads and embeddings and len(heads) + len(embeddings) == len(uses):
        return Tied(total(heads), total(embeddings))  # type: ignore[arg-type]
    return Total(uses)


class Tied(Total):
    """Embedding and lm_head with one weight. The two meet only in the rows of tokens that occur in the example: these
    rows are taken out of the head's product and added with the embedding's part inside the square."""

    def __init__(self, head: Outer, embedding: Rows) -> None:
        super().__init__([head, embedding])
        self.head, self.embedding = head, embedding

    def add_to(self, moments: Moments) -> None:
        n, T, V = self.head.grads.shape
        step = max(1, WORKSPACE_BYTES // max(1, T * V * self.head.grads.element_size()))
        tokens = DistinctTokens(self.embedding.tokens)
        for start in range(0, n, step):
            grads = self.head.grads[start : start + step].clone()
            for b, example_grads in enumerate(grads, start):
                self._add_shared_rows(b, tokens, example_grads, moments.of_examples(b, b + 1))
            stop = start + len(grads)
            Outer(self.head.inputs[start:stop], grads).add_to(moments.of_examples(start, stop))

    def _add_shared_rows(self, b: int, tokens: "DistinctTokens", grads: Tensor, moments: Moments) -> None:
        """Adds the rows of the tokens in example b, and zeroes these in the head's gradients [T, V]."""
        dtype, rows = moments.second.dtype, tokens.rows[b]
        of_head = grads[:, rows]
        shared = of_head.to(dtype).T @ self.head.inputs[b].to(dtype)
        shared.index_add_(0, tokens.place[b], self.embedding.grads[b][tokens.order[b]].to(dtype))
        moments.add(shared.masked_fill_(tokens.empty[b].unsqueeze(1), 0)[None], rows=rows)
        grads[:, rows] = of_head.masked_fill_(tokens.any[b], 0)


class DistinctTokens:
    """The distinct tokens of each example, in as many places as it has positions: counting them would wait for a GPU.

    What is left of the places is empty, and stands for the row of the largest token once more.
    """

    def __init__(self, tokens: Tensor) -> None:  # [n, T], negative: none
        ordered, self.order = tokens.sort(dim=1, stable=True)
        begins = torch.ones_like(ordered, dtype=torch.bool)
        begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        self.place = begins.cumsum(1) - 1  # of each of the ordered tokens
        largest = ordered[:, -1:]
        rows = largest.expand_as(ordered).scatter(1, self.place, ordered)
        behind = torch.arange(ordered.shape[1], device=ordered.device) > self.place[:, -1:]
        self.empty = behind | (rows < 0)
        self.rows = torch.where(rows < 0, largest, rows).clamp(min=0)
        self.any = largest.squeeze(1) >= 0  # whether the example has tokens at all


def _between(t: Tensor, start: int, stop: int) -> Tensor:
    """The examples [start, stop)."""
    return t if stop - start == t.shape[0] else t[start:stop]


def _joined(parts: list[Tensor]) -> Tensor:
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in parts], 1)


def _same_dtype(inputs: Any, grads: Tensor) -> tuple[Any, Tensor]:
    """They differ under autocast."""
    if inputs is None or inputs.dtype == grads.dtype:
        return inputs, grads
    dtype = torch.promote_types(inputs.dtype, grads.dtype)
    return inputs.to(dtype), grads.to(dtype)
