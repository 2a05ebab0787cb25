"""The forms that per-example gradients of a parameter take, and how each adds its squares without becoming [B, P].

A gradient here stands for G_b, b = 0..B-1. `add_squares_(out)` does `out += sum_b G_b^2`; `example(b)` is one G_b, for
the combinations of uses that have no form of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unlearn_fast.ops.sum_grad_squared_linear import sum_grad_squared_linear_

WORKSPACE_BYTES = 32 << 20


def wide(t: Tensor) -> torch.dtype:
    """What squares of the tensor are summed in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class PerExampleGradient(Protocol):
    def add_squares_(self, out: Tensor) -> None: ...
    def example(self, b: int) -> Tensor: ...
    def examples(self) -> int: ...


@dataclass
class Outer:
    """G_b = sum_t grads[b, t]^T inputs[b, t], of shape [O, I]: the weight of a linear layer."""

    inputs: Tensor  # [B, T, I]
    grads: Tensor  # [B, T, O]

    def add_squares_(self, out: Tensor) -> None:
        dtype = torch.promote_types(self.inputs.dtype, self.grads.dtype)  # they differ under autocast
        matrix = out.view(self.grads.shape[-1], -1)
        sum_grad_squared_linear_(matrix, self.inputs.to(dtype), self.grads.to(dtype))

    def example(self, b: int) -> Tensor:
        dtype = torch.promote_types(self.inputs.dtype, self.grads.dtype)
        return self.grads[b].to(dtype).T @ self.inputs[b].to(dtype)

    def examples(self) -> int:
        return self.inputs.shape[0]


@dataclass
class Rows:
    """G_b[v] = sum of grads[b, t] over the positions t where tokens[b, t] = v: the weight of an embedding."""

    tokens: Tensor  # [B, T]
    grads: Tensor  # [B, T, H]
    rows: int  # V

    def add_squares_(self, out: Tensor) -> None:
        B, T = self.tokens.shape
        example = torch.arange(B, device=self.tokens.device).repeat_interleave(T)
        key, place = torch.unique(example * self.rows + self.tokens.reshape(-1), return_inverse=True)
        sums = out.new_zeros(len(key), out.shape[-1])
        sums.index_add_(0, place, self.grads.reshape(B * T, -1).to(out.dtype))
        out.index_add_(0, key % self.rows, sums.square_())

    def example(self, b: int) -> Tensor:
        out = self.grads.new_zeros(self.rows, self.grads.shape[-1])
        return out.index_add_(0, self.tokens[b], self.grads[b])

    def examples(self) -> int:
        return self.tokens.shape[0]


@dataclass
class Dense:
    """G_b itself, [B, ...]: parameters so small that it costs nothing (norms, biases)."""

    values: Tensor

    def add_squares_(self, out: Tensor) -> None:
        out.add_(self.values.square().sum(0).view_as(out))

    def example(self, b: int) -> Tensor:
        return self.values[b]

    def examples(self) -> int:
        return self.values.shape[0]


def add_squares_of_sum_(out: Tensor, uses: Sequence[PerExampleGradient]) -> None:
    """out += sum_b (sum of the uses' G_b)^2: a parameter that is used several times has ONE gradient an example."""
    first, *others = uses
    if not others:
        first.add_squares_(out)
    elif all(isinstance(use, Outer) for use in uses):
        outers = [use for use in uses if isinstance(use, Outer)]
        Outer(torch.cat([u.inputs for u in outers], 1), torch.cat([u.grads for u in outers], 1)).add_squares_(out)
    elif all(isinstance(use, Rows) for use in uses):
        rows = [use for use in uses if isinstance(use, Rows)]
        tokens, grads = torch.cat([u.tokens for u in rows], 1), torch.cat([u.grads for u in rows], 1)
        Rows(tokens, grads, rows[0].rows).add_squares_(out)
    elif len(uses) == 2 and {type(use) for use in uses} == {Outer, Rows}:
        outer, embedding = (first, others[0]) if isinstance(first, Outer) else (others[0], first)
        _add_tied_(out, outer, embedding)  # type: ignore[arg-type]
    else:
        for b in range(first.examples()):
            total = torch.zeros_like(out)
            for use in uses:
                total += use.example(b).view_as(out)
            out.add_(total.square_())


def _add_tied_(out: Tensor, head: Outer, embedding: Rows) -> None:
    """Embedding and lm_head with one weight. The two meet only in the rows of tokens that occur in the example: these
    rows are taken out of the head's product and added with the embedding's part inside the square."""
    B, T, V = head.grads.shape
    step = max(1, WORKSPACE_BYTES // max(1, T * V * head.grads.element_size()))
    for start in range(0, B, step):
        grads = head.grads[start : start + step].clone()
        for b, example_grads in enumerate(grads, start):
            tokens, place = embedding.tokens[b].unique(return_inverse=True)
            total = example_grads[:, tokens].to(out.dtype).T @ head.inputs[b].to(out.dtype)
            total.index_add_(0, place, embedding.grads[b].to(out.dtype))
            out.index_add_(0, tokens, total.square_())
            example_grads[:, tokens] = 0
        Outer(head.inputs[start : start + step], grads).add_squares_(out)
