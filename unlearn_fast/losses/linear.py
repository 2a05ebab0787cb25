"""A mean over sequences from hidden states and the lm_head: neither logits in memory nor their recomputation.

A loss is a function of the rows' log-probabilities, sequence by sequence. So once the logits of a chunk of whole
sequences are known, their cotangent is known too, and the gradients of hidden states, weight and bias are accumulated
at once, in the forward: 6 N H V floating-point operations for N rows, 4 N H V where the weight (or the hidden states)
is frozen, 2 N H V without gradients. The backward only scales them by the upstream factor.

The logits of all chunks lie in one buffer, where the row operator overwrites them with their gradient. A sequence with
more rows than a chunk is computed in pieces. Where a row's cotangent depends on more than the row (`Unit`), the pieces'
logits are computed a second time for the gradients, but for the last piece's: up to 8 N H V for such sequences.
"""

import importlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_fast import _library
from unlearn_fast.losses.rows import Rows
from unlearn_fast.losses.vocabulary import VocabularyShard
from unlearn_fast.ops import _chunks


class Unit(Enum):
    """What has to be known before the derivative in a row's number is."""

    ROW = "the number itself: the value is a sum over rows, whose weights the labels tell"
    SEQUENCE = "the numbers of its sequence: the value is a sum over sides, 0 for one without a labelled row"
    SEQUENCES = "the numbers of the sequences of all sides"


class Head(NamedTuple):
    """logits = hidden @ weight.T + bias, for each side's hidden states."""

    hidden: Sequence[Tensor]  # [B, T, H], one a side; the sides may differ in T
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


@dataclass(frozen=True)
class MeanOfSequences:
    """What is computed, but for what it is differentiated in: sum(values(...)) / divisor."""

    values: Callable[..., Tensor]  # (row values [b, T], labelled [b, T], the same of other sides, *constants) -> [b]
    rows: Rows
    targets: Sequence[Tensor]  # [B, T], one a side: the label that each row predicts
    constants: Sequence[Tensor]  # [B] each
    divisor: int | Tensor
    ignore_index: int
    chunk_bytes: int | None
    weight_grad_dtype: torch.dtype | None
    unit: Unit = Unit.SEQUENCES
    teacher: Head | None = None
    shard: VocabularyShard | None = None


def mean_of_sequences(call: MeanOfSequences, head: Head) -> Tensor:  # []
    """The mean, differentiable once in the head's tensors. Everything has been checked."""
    return _not_compiled(_mean)(call, head)


def values_of_sequences(call: MeanOfSequences, head: Head) -> Tensor:  # [B]
    """What the mean is of, without gradients."""
    return _not_compiled(_values)(call, head)


def _not_compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Under torch.compile, the function as a graph break: the number of labelled rows decides in Python what is
    computed, in place. Not as a decorator, which would import the compiler with the package.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _mean(call: MeanOfSequences, head: Head) -> Tensor:
    tensors = (*head.hidden, head.weight, head.bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if any(needs):
        return _GradientsInForward.apply(call, needs, *tensors)
    return _values(call, head).sum() / call.divisor


def _values(call: MeanOfSequences, head: Head) -> Tensor:
    with torch.no_grad():
        return _values_and_gradients(call, head, [False] * (len(head.hidden) + 2))[0]


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: MeanOfSequences, needs: list[bool], *tensors: Any) -> Tensor:
        *hidden, weight, bias = tensors
        values, ctx.gradients = _values_and_gradients(call, Head(hidden, weight, bias), needs)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return values.sum() / call.divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("create_graph=True through this loss: only first derivatives are supported")
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward through this loss: its gradients were computed in the forward, and the first"
                " backward gave them away. Compute the loss again, or ask for all gradients at once"
            )
        # Given away, not only lent: autograd then makes them the leaves' gradients without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (g if g is None else _scaled(g, grad).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        return None, None, *scaled


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """In place. The factor of a loss that is differentiated by itself is 1, which costs nothing."""
    if gradient.is_cuda and gradient.is_contiguous() and "triton" not in _library.missing:
        importlib.import_module("unlearn_fast.ops._triton").scale_(gradient, factor)
    elif gradient.device.type != "cpu" or factor != 1:
        gradient.mul_(factor)
    return gradient


def _values_and_gradients(
    call: MeanOfSequences, head: Head, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sequences' values, and the mean's gradients in hidden states, weight and bias: None where not needed."""
    # The products run in the dtype of the inputs: autocast would give logits and gradients different ones.
    with torch.autocast(head.weight.device.type, enabled=False):
        return _Run(call, head, needs).result()


class _Chunk(NamedTuple):
    """Consecutive sequences, and each side's rows in them: a slice, or indices where ignored rows are left out."""

    sequences: slice
    rows: Sequence[Any]  # none of the sides that other chunks take
    sizes: Sequence[int]  # how many rows each side has


class _Labelled:
    """Where the rows of each side are."""

    def __init__(self, targets: Sequence[Tensor], ignore_index: int, unit: Unit) -> None:
        B = targets[0].shape[0]
        if _chunks.only_labelled_rows(targets[0]):
            labelled = [t != ignore_index for t in targets]
            self.kept: list[Any] = [mask.view(-1).nonzero().squeeze(-1) for mask in labelled]
            self.ends = [[0, *mask.sum(1).cumsum(0).tolist()] for mask in labelled]
        else:
            self.kept = [None for _ in targets]
            self.ends = [[b * t.shape[1] for b in range(B + 1)] for t in targets]
        every = range(len(targets))
        self.groups = [every] if unit is Unit.SEQUENCES else [[side] for side in every]  # sides that share chunks

    @property
    def rows(self) -> int:
        return sum(end[-1] for end in self.ends)

    def longest(self) -> int:
        """Rows of the longest sequence, together with those of the other sides in its chunk."""
        totals = (self._totals(group) for group in self.groups)
        return max((after - before for total in totals for before, after in pairwise(total)), default=0)

    def chunks(self, size: int) -> list[_Chunk]:
        """As many sequences a chunk as have at most `size` rows, but at least one; none for sequences without rows."""
        found = []
        for group in self.groups:
            total, start = self._totals(group), 0
            while start < len(total) - 1:
                stop = max(start + 1, bisect_right(total, total[start] + size) - 1)
                if total[stop] > total[start]:
                    found.append(self._chunk(slice(start, stop), group))
                start = stop
        return found

    def _totals(self, group: Sequence[int]) -> list[int]:
        return [sum(of_sides) for of_sides in zip(*(self.ends[side] for side in group), strict=True)]

    def _chunk(self, sequences: slice, group: Sequence[int]) -> _Chunk:
        rows, sizes = [], []
        for side, (kept, end) in enumerate(zip(self.kept, self.ends, strict=True)):
            bound = slice(end[sequences.start], end[sequences.stop]) if side in group else slice(0, 0)
            rows.append(bound if kept is None else kept[bound])
            sizes.append(bound.stop - bound.start)
        return _Chunk(sequences, rows, sizes)


class _Run:
    """One forward: what is kept from chunk to chunk."""

    def __init__(self, call: MeanOfSequences, head: Head, needs: Sequence[bool]) -> None:
        self.call, self.needs = call, any(needs)
        *sides, need_weight, need_bias = needs
        heads = [h for h in (head, call.teacher) if h is not None]
        self.hidden = [[x.flatten(0, 1) for x in h.hidden] for h in heads]
        self.targets = [t.reshape(-1) for t in call.targets]
        labelled = _Labelled(call.targets, call.ignore_index, call.unit)
        V = call.shard.rows if call.shard else len(head.weight)
        self.size = _chunks.rows_a_chunk(
            call.chunk_bytes,
            V * sum(h.weight.element_size() for h in heads),
            labelled.rows,
            head.weight.device,
            together=1 if call.unit is Unit.ROW else labelled.longest(),
        )
        self.chunks = labelled.chunks(self.size)
        longest = min(self.size, max((sum(chunk.sizes) for chunk in self.chunks), default=0))
        self.logits = [_chunks.Logits(h.weight, h.bias, longest) for h in heads]
        self.d_hidden = [torch.zeros_like(x) if need else None for x, need in zip(self.hidden[0], sides, strict=True)]
        self.d_head = _chunks.HeadGradient(
            head.weight, call.weight_grad_dtype or head.weight.dtype, need_weight=need_weight, need_bias=need_bias
        )

    def result(self) -> tuple[Tensor, list[Tensor | None]]:
        values = self.d_head.bias.new_zeros(self.call.targets[0].shape[0])
        for chunk in self.chunks:
            values[chunk.sequences] += self.add(chunk)
        if self.call.shard is not None:
            for d in self.d_hidden:
                if d is not None:
                    self.call.shard.sum_(d)
        gradients = [
            None if d is None else d.view(*t.shape, d.shape[-1])
            for d, t in zip(self.d_hidden, self.call.targets, strict=True)
        ]
        d_weight, d_bias = self.d_head.finish()
        gradients += [d_weight if self.d_head.need_weight else None, d_bias if self.d_head.need_bias else None]
        return values, gradients

    def add(self, chunk: _Chunk) -> Tensor:
        """What the chunk's rows add to the values of its sequences; their gradients are added to the totals."""
        labels = torch.cat([t[i] for t, i in zip(self.targets, chunk.rows, strict=True)])
        inputs = [
            _chunks.without_ignored(
                torch.cat([x[i] for x, i in zip(hidden, chunk.rows, strict=True)]), labels, self.call.ignore_index
            )
            for hidden in self.hidden
        ]
        pieces = _chunks.pieces(len(labels), self.size)
        numbers = self.d_head.bias.new_full(labels.shape, -1.0)  # of rows to come, any number that is no extreme
        d_inputs = torch.empty_like(inputs[0]) if any(d is not None for d in self.d_hidden) else None
        at_once = self.needs and self.call.unit is Unit.ROW  # each piece's gradients follow its logits
        for group in [[piece] for piece in pieces] if at_once else [pieces]:
            saved = []
            for piece in group:
                logits = self.logits_of(inputs, piece)
                saved.append(self.call.rows.forward(labels[piece], *logits))
                numbers[piece] = saved[-1][0]
            values, grad = self.values_and_cotangent(chunk, numbers)
            if not self.needs:
                continue
            for piece, stats in zip(reversed(group), reversed(saved), strict=True):
                if piece is not group[-1]:  # the next piece needed the memory of its logits
                    logits = self.logits_of(inputs, piece)
                self.call.rows.backward_(grad[piece], labels[piece], stats, *logits)
                if d_inputs is not None:
                    torch.mm(logits[0], self.logits[0].weight, out=d_inputs[piece])
                self.d_head.add(logits[0], inputs[0][piece])
        if d_inputs is not None:
            for total, i, d in zip(self.d_hidden, chunk.rows, d_inputs.split(list(chunk.sizes)), strict=True):
                if total is not None:
                    total[i] = d
        return values

    def logits_of(self, inputs: Sequence[Tensor], piece: slice) -> list[Tensor]:
        return [logits.of(x[piece]) for logits, x in zip(self.logits, inputs, strict=True)]

    def values_and_cotangent(self, chunk: _Chunk, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the chunk's sequences, [b], and the mean's gradient in the rows' numbers."""
        with torch.set_grad_enabled(self.needs):
            numbers = numbers.detach().requires_grad_(self.needs)
            arguments = []
            parts = zip(self.call.targets, chunk.rows, numbers.split(list(chunk.sizes)), strict=True)
            for targets, i, part in parts:
                of_chunk = targets[chunk.sequences]
                labelled = of_chunk != self.call.ignore_index
                if len(part) == 0:  # nothing is labelled, or other chunks take this side
                    labelled, part = torch.zeros_like(labelled), part.new_zeros(of_chunk.numel())
                elif not isinstance(i, slice):
                    i = i - chunk.sequences.start * targets.shape[1]
                    part = part.new_zeros(of_chunk.numel()).index_put((i,), part)
                arguments += [part.view(of_chunk.shape), labelled]
            constants = [c[chunk.sequences] for c in self.call.constants]
            values = self.call.values(*arguments, *constants)
            if not self.needs:
                return values, numbers
            (grad,) = torch.autograd.grad(values.sum() / self.call.divisor, numbers)
        return values.detach(), grad
