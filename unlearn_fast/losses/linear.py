"""A mean over sequences from hidden states and the lm_head: neither logits in memory nor their recomputation.

A loss is a function of the rows' log-probabilities, sequence by sequence. So once the logits of a chunk of whole
sequences are known, their cotangent is known too, and the gradients of hidden states, weight and bias are accumulated
at once, in the forward: 6 N H V floating-point operations for N rows, 4 N H V where the weight (or the hidden states)
is frozen, 2 N H V without gradients. The backward only scales them by the upstream factor.

The logits of all chunks lie in one buffer, where the row operator overwrites them with their gradient: on a CPU, fresh
memory for each chunk would cost more than the operator. A sequence with more rows than a chunk is computed in pieces,
whose logits are computed a second time for the gradients, but for the last piece's: up to 8 N H V for such sequences.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_fast.losses.rows import Rows
from unlearn_fast.losses.vocabulary import VocabularyShard

SCRATCH_BYTES = 8 << 20  # of a product that is added to a total of another dtype, block by block: a cache's size


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
    chunk_bytes: int
    weight_grad_dtype: torch.dtype | None
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
        scaled = (g if g is None else g.mul_(grad).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        return None, None, *scaled


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
    rows: Sequence[Any]
    sizes: Sequence[int]  # how many rows each side has


def _only_labelled_rows(labels: Tensor) -> bool:
    """Whether ignored rows are left out: where asking which they are would not make the CPU wait for a device."""
    return labels.device.type == "cpu"


def _chunks(targets: Sequence[Tensor], ignore_index: int, size: int) -> list[_Chunk]:
    """As many sequences a chunk as have at most `size` rows, but at least one; none for sequences without rows."""
    B = targets[0].shape[0]
    if _only_labelled_rows(targets[0]):
        labelled = [t != ignore_index for t in targets]
        kept: list[Any] = [mask.view(-1).nonzero().squeeze(-1) for mask in labelled]
        ends = [[0, *mask.sum(1).cumsum(0).tolist()] for mask in labelled]
    else:
        kept = [None for _ in targets]
        ends = [[b * t.shape[1] for b in range(B + 1)] for t in targets]
    total = [sum(of_sides) for of_sides in zip(*ends, strict=True)]
    chunks, start = [], 0
    while start < B:
        stop = max(start + 1, bisect_right(total, total[start] + size) - 1)
        bounds = [slice(end[start], end[stop]) for end in ends]
        rows = [bound if k is None else k[bound] for k, bound in zip(kept, bounds, strict=True)]
        if total[stop] > total[start]:
            chunks.append(_Chunk(slice(start, stop), rows, [bound.stop - bound.start for bound in bounds]))
        start = stop
    return chunks


class _Run:
    """One forward: what is kept from chunk to chunk."""

    def __init__(self, call: MeanOfSequences, head: Head, needs: Sequence[bool]) -> None:
        self.call, self.V, dtype = call, len(head.weight), head.weight.dtype
        self.heads = [
            h._replace(hidden=[x.flatten(0, 1) for x in h.hidden]) for h in (head, call.teacher) if h is not None
        ]
        self.targets = [t.reshape(-1) for t in call.targets]
        self.needs = needs
        *sides, self.need_weight, self.need_bias = needs
        self.need_hidden = any(sides)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        row_bytes = sum(h.weight.element_size() for h in self.heads) * (call.shard.rows if call.shard else self.V)
        self.size = max(1, call.chunk_bytes // max(1, row_bytes))
        self.chunks = _chunks(call.targets, call.ignore_index, self.size)
        longest = min(self.size, max((sum(chunk.sizes) for chunk in self.chunks), default=0))
        self.buffers = [h.weight.new_empty(longest, self.V) for h in self.heads]
        self.d_hidden = [
            torch.zeros_like(x) if need else None for x, need in zip(self.heads[0].hidden, sides, strict=True)
        ]
        self.d_weight = head.weight.new_empty(
            head.weight.shape if self.need_weight else 0, dtype=call.weight_grad_dtype or dtype
        )
        self.d_bias = head.weight.new_zeros(self.V if self.need_bias else 0, dtype=self.wide)
        self.fresh = True  # d_weight is not written yet: the first product does it

    def result(self) -> tuple[Tensor, list[Tensor | None]]:
        values = self.d_bias.new_zeros(self.call.targets[0].shape[0])
        for chunk in self.chunks:
            values[chunk.sequences] = self.add(chunk)
        if self.fresh:
            self.d_weight.zero_()
        if self.call.shard is not None:
            for d in self.d_hidden:
                if d is not None:
                    self.call.shard.sum_(d)
        hidden = [
            None if d is None else d.view(*t.shape, d.shape[-1])
            for d, t in zip(self.d_hidden, self.call.targets, strict=True)
        ]
        return values, [*hidden, self.d_weight if self.need_weight else None, self.d_bias if self.need_bias else None]

    def add(self, chunk: _Chunk) -> Tensor:
        """The values of the chunk's sequences; their gradients are added to the totals."""
        labels = torch.cat([t[i] for t, i in zip(self.targets, chunk.rows, strict=True)])
        inputs = [torch.cat([x[i] for x, i in zip(h.hidden, chunk.rows, strict=True)]) for h in self.heads]
        if not _only_labelled_rows(labels):  # ignored rows are still here, and 0 * NaN would reach the weight
            ignored = (labels == self.call.ignore_index).unsqueeze(-1)
            inputs = [x.masked_fill_(ignored, 0) for x in inputs]
        pieces = [slice(a, min(a + self.size, len(labels))) for a in range(0, len(labels), self.size)]
        saved = []
        for piece in pieces:
            logits = self.products(inputs, piece)
            saved.append(self.call.rows.forward(labels[piece], *logits))
        values, grad = self.values_and_cotangent(chunk, torch.cat([numbers for numbers, *_ in saved]))
        if not any(self.needs):
            return values
        d_inputs = torch.empty_like(inputs[0])
        for piece, stats in zip(reversed(pieces), reversed(saved), strict=True):
            if piece != pieces[-1]:  # the next piece needed the memory of its logits
                logits = self.products(inputs, piece)
            self.call.rows.backward_(grad[piece], labels[piece], stats, *logits)
            self.add_gradients(logits[0], inputs[0][piece], d_inputs[piece])
        for total, i, d in zip(self.d_hidden, chunk.rows, d_inputs.split(chunk.sizes), strict=True):
            if total is not None:
                total[i] = d
        return values

    def products(self, inputs: Sequence[Tensor], piece: slice) -> list[Tensor]:
        """Each head's logits of a piece, in its buffer."""
        logits = [buffer[: piece.stop - piece.start] for buffer in self.buffers]
        for head, x, out in zip(self.heads, inputs, logits, strict=True):
            if head.bias is None:
                torch.mm(x[piece], head.weight.T, out=out)
            else:
                torch.addmm(head.bias, x[piece], head.weight.T, out=out)
        return logits

    def values_and_cotangent(self, chunk: _Chunk, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the chunk's sequences, [b], and the mean's gradient in the rows' numbers."""
        with torch.set_grad_enabled(any(self.needs)):
            numbers = numbers.detach().requires_grad_(any(self.needs))
            arguments = []
            for targets, i, part in zip(self.call.targets, chunk.rows, numbers.split(chunk.sizes), strict=True):
                of_chunk = targets[chunk.sequences]
                if not isinstance(i, slice):
                    i = i - chunk.sequences.start * targets.shape[1]
                    part = part.new_zeros(of_chunk.numel()).index_put((i,), part)
                arguments += [part.view(of_chunk.shape), of_chunk != self.call.ignore_index]
            constants = [c[chunk.sequences] for c in self.call.constants]
            values = self.call.values(*arguments, *constants)
            if not any(self.needs):
                return values, numbers
            (grad,) = torch.autograd.grad(values.sum() / self.call.divisor, numbers)
        return values.detach(), grad

    def add_gradients(self, d_logits: Tensor, inputs: Tensor, d_inputs: Tensor) -> None:
        """d_inputs is written, the others are added to."""
        if self.need_hidden:
            torch.mm(d_logits, self.heads[0].weight, out=d_inputs)
        if self.need_weight:
            _add_product_(self.d_weight, d_logits.T, inputs, self.fresh)
            self.fresh = False
        if self.need_bias:
            self.d_bias += d_logits.sum(0, dtype=self.wide)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total += a @ b, or total = a @ b where its memory is fresh. A product of another dtype is added in blocks."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if fresh else 1, out=total)
        return
    size = max(1, SCRATCH_BYTES // (b.shape[1] * b.element_size()))
    scratch = b.new_empty(min(size, len(a)), b.shape[1])
    for start in range(0, len(a), size):
        block, rows = total[start : start + size], a[start : start + size]
        product = torch.mm(rows, b, out=scratch[: len(rows)])
        if fresh:
            block.copy_(product)
        else:
            block.add_(product)
