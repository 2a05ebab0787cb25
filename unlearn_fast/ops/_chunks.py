"""Logits of a chunk of rows at a time: how many rows, the products that make them, and the gradients made of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_fast import _library

SCRATCH_BYTES = 8 << 20  # of a product that is added to a total of another dtype, block by block: a cache's size

# Blocks of columns in which the CPU's products of a [V, H] matrix run faster than at once, on a Zen 4 with 2 threads:
# MKL's float32 logits by 1.3 to 1.6, where the block's logits stay in a core's cache, as it adds to them again and
# again; oneDNN's 16-bit gradient of the weight by 1.3 to 1.4. The other way round both lose by a tenth.
LOGITS_BLOCK_BYTES = 512 << 10
GRADIENT_BLOCK = 8192


class Default(NamedTuple):
    """Rows a chunk where the caller has not said how many bytes: a share of all, between limits."""

    share: float  # of all rows
    least: int  # rows, enough for the matrix products to run near their best
    most_bytes: int


# On a CPU a sixteenth of the logits costs about what the bare products do, all rows at once; more rows, a tenth less.
DEFAULTS = {"cpu": Default(1 / 16, 128, 64 << 20)}
ELSEWHERE = Default(1, 0, 768 << 20)  # a GPU's products want thousands of rows


def rows_a_chunk(chunk_bytes: int | None, row_bytes: int, N: int, device: torch.device, *, together: int = 1) -> int:
    """At least 1. `together`: rows that had better be in one chunk, which the default respects where memory allows."""
    if chunk_bytes is not None:
        return max(1, chunk_bytes // max(1, row_bytes))
    default = DEFAULTS.get(device.type, ELSEWHERE)
    wanted = max(int(N * default.share), default.least, together)
    return max(1, min(wanted, default.most_bytes // max(1, row_bytes)))


class Logits:
    """Of one chunk after another, in one buffer: on a CPU, fresh memory for each would cost more than the softmax."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:  # [V, H], [V]
        self.weight, self.bias = weight, bias
        self.buffer = _fresh(weight, (rows, len(weight)), weight.dtype)

    def of(self, hidden: Tensor) -> Tensor:  # [n, H] -> [n, V]
        """hidden @ weight.T + bias, over the logits before."""
        out = self.buffer[: len(hidden)]
        for columns in pieces(len(self.weight), self._block(len(hidden))):
            weight, block = self.weight[columns].T, out[:, columns]
            if self.bias is None:
                torch.mm(hidden, weight, out=block)
            else:
                torch.addmm(self.bias[columns], hidden, weight, out=block)
        return out

    def _block(self, rows: int) -> int:
        if self.weight.device.type != "cpu" or _is_16_bit(self.weight):
            return len(self.weight)
        return max(1, LOGITS_BLOCK_BYTES // (max(1, rows) * self.weight.element_size()))


class HeadGradient:
    """The gradients of weight and bias, summed up over chunks; empty where they are not needed."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, need_weight: bool, need_bias: bool) -> None:
        self.need_weight, self.need_bias = need_weight, need_bias
        self.weight = _fresh(weight, weight.shape if need_weight else (0,), dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.bias = weight.new_zeros(len(weight) if need_bias else 0, dtype=wide)
        self.fresh = True  # the weight's is not written yet: the first product does it

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        if self.need_weight:
            add_product_(self.weight, d_logits.T, hidden, self.fresh)
            self.fresh = False
        if self.need_bias:
            self.bias += d_logits.sum(0, dtype=self.bias.dtype)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Those of weight and bias."""
        if self.fresh:
            self.weight.zero_()
        return self.weight, self.bias


def add_product_(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total += a @ b, or total = a @ b where its memory is fresh. A product of another dtype is added in blocks."""
    if total.dtype == a.dtype:
        block = GRADIENT_BLOCK if total.device.type == "cpu" and _is_16_bit(total) else len(total)
        for rows in pieces(len(total), block):
            torch.addmm(total[rows], a[rows], b, beta=0 if fresh else 1, out=total[rows])
        return
    size = max(1, SCRATCH_BYTES // (b.shape[1] * b.element_size()))
    scratch = b.new_empty(min(size, len(a)), b.shape[1])
    for rows in pieces(len(a), size):
        product = torch.mm(a[rows], b, out=scratch[: rows.stop - rows.start])
        if fresh:
            total[rows].copy_(product)
        else:
            total[rows].add_(product)


def only_labelled_rows(labels: Tensor) -> bool:
    """Whether ignored rows are left out: where asking which they are would not make the CPU wait for a device."""
    return labels.device.type == "cpu"


def without_ignored(hidden: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """With zeros in rows to be ignored, where they are still here: 0 * NaN would reach the weight's gradient."""
    if only_labelled_rows(labels):
        return hidden
    return hidden.masked_fill((labels == ignore_index).unsqueeze(-1), 0)


def pieces(n: int, size: int) -> list[slice]:
    """0 to n in slices of `size`."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that nobody has touched, in huge pages where there are: a page fault costs more than filling the page."""
    memory = like.new_empty(shape, dtype=dtype)
    if memory.device.type == "cpu" and _library.native is not None:
        _library.native.advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def _is_16_bit(x: Tensor) -> bool:
    return x.element_size() == 2
