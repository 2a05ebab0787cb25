"""What the Triton kernels of rows of logits share: how a row is walked, exponentials, the softcap, running sums.

A row is walked in blocks from its first element that lies on a cache line, around its end, and back to its start, so
that all blocks but the last one or two are full and load whole vectors, whatever the row's address (GPT-2's 50257
columns, say). A block is [UNROLL, LANES, VECTOR]: one lane a thread, one vector of 16 bytes a load. Maxima and sums run
in each lane, without a word between threads, until the row ends.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_fast.ops._triton import processors, splits

LINE = tl.constexpr(128)  # bytes
VECTOR_BYTES = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
VANISHING = tl.constexpr(-800.0)  # its exponential is 0 in float32 and float64, but it is not infinite


# -- where a row's elements are ----------------------------------------------------------------------------------------


@triton.jit
def label_of(labels, row, V, ignore_index):
    """A row's label, -1 where it is ignored or out of range, and whether it is ignored."""
    label = tl.load(labels + row).to(tl.int64)
    ignored = label == ignore_index
    return tl.where((label >= 0) & (label < V) & (not ignored), label, -1).to(tl.int32), ignored


@triton.jit
def start_of(row, T, stride_0, stride_b, stride_t):
    """Elements from the start of the storage to a row."""
    return stride_0 + (row // T) * stride_b + (row % T) * stride_t


@triton.jit
def before_line(tensor, start, V, ALIGNED: tl.constexpr):
    """How many elements of a row come before its first cache line. ALIGNED: all vectors lie well without."""
    if ALIGNED:
        return tl.full([], 0, tl.int32)
    line: tl.constexpr = LINE * 8 // tensor.dtype.element_ty.primitive_bitwidth
    return tl.minimum((-start & (line - 1)).to(tl.int32), V)


@triton.jit
def at_vector(tensor, start, KNOWN: tl.constexpr):
    """The address of `start`, known to be one of a whole vector: the compiler sees it in the multiplication."""
    unit: tl.constexpr = VECTOR_BYTES * 8 // tensor.dtype.element_ty.primitive_bitwidth
    return tensor + (start // unit * unit if KNOWN else start)


@triton.jit
def columns(place, lead, V, ALIGNED: tl.constexpr):
    """The columns of places that are counted from column `lead`, around the row's end."""
    if ALIGNED:
        return place
    column = place + lead
    return tl.where(column >= V, column - V, column)


@triton.jit
def lanes(LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr):
    """[UNROLL, LANES, VECTOR]: the places of a block."""
    u, lane, v = tl.arange(0, UNROLL), tl.arange(0, LANES), tl.arange(0, VECTOR)
    return u[:, None, None] * (LANES * VECTOR) + lane[None, :, None] * VECTOR + v[None, None, :]


# -- functions of elements ---------------------------------------------------------------------------------------------


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    return tl.full([], value, DTYPE)


@triton.jit
def larger(a, b):
    """The maximum, NaN where either is: a row's NaN must reach its maximum."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exponential(x, factor, PRECISE: tl.constexpr):
    """exp(factor * x), for a factor in float64.

    In float32, exp2 is one instruction, but its argument is rounded, which costs the more the larger it is. PRECISE
    keeps what is lost there; x must then be finite, or NaN.
    """
    factor = scalar(factor, tl.float64)
    if x.dtype == tl.float64:
        return tl.exp(x * factor)
    high = (factor * LOG2_E).to(tl.float32)
    argument = x * high
    result = tl.exp2(argument)
    if PRECISE:
        low = (factor * LOG2_E - high.to(tl.float64)).to(tl.float32)
        lost = tl.fma(x, low, tl.fma(x, high, -argument))
        result = tl.fma(result, lost * LN_2, result)
    return result


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, precise relative to its own size."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / (y - 1)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, precise relative to its own size."""
    y = exponential(larger(x, VANISHING), 1.0, True)
    return tl.where(y == 1, x, tl.where(x < -0.5, y - 1, (y - 1) * (x / tl.log(y))))


@triton.jit
def tanh(x):
    """From an exponential; near 0, where that would cancel, from a polynomial, in float64 a quotient of two."""
    square = x * x
    if x.dtype == tl.float64:
        size = tl.abs(x)
        small = size < 0.375
        e = tl.exp(-2 * size)
        above = 135135 + square * (17325 + square * (378 + square))
        below = 135135 + square * (62370 + square * (3150 + 28 * square))
        result = tl.where(small, size * above, 1 - e) / tl.where(small, below, 1 + e)
        return tl.where(x < 0, -result, result)
    near = -0.33333331 + square * (0.13332781 + square * (-0.05377006 + square * 0.01955967))
    far = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))
    return tl.where(tl.abs(x) < 0.375, x + x * square * near, far)


@triton.jit
def capped(x, inverse, CAP: tl.constexpr):
    """tanh(x / softcap), or x without CAP: in either case, z = factor * that."""
    return tanh(x * scalar(inverse, x.dtype)) if CAP else x


@triton.jit
def uncapped(dz, y, factor, inverse, CAP: tl.constexpr):
    """The gradient of x from that of z = factor * y, for y = tanh(inverse * x) or, without CAP, x."""
    if CAP:
        return dz * ((1 - y * y) * scalar(factor * inverse, y.dtype))
    return dz * scalar(factor, y.dtype)


# -- running maxima and sums -------------------------------------------------------------------------------------------


@triton.jit
def lowest(N: tl.constexpr, DTYPE: tl.constexpr):
    """[N]: what running maxima start from. Finite, as the difference of two infinities is NaN."""
    double: tl.constexpr = tl.float64 == DTYPE
    return tl.full([N], -1.7976931348623157e308 if double else -3.4028234663852886e38, DTYPE)


@triton.jit
def block_max(x):
    """[LANES] of [UNROLL, LANES, VECTOR]: within threads."""
    return tl.reduce(tl.reduce(x, 2, larger), 0, larger)


@triton.jit
def block_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def weights(x, high, factor, bound, PRECISE: tl.constexpr, FINITE: tl.constexpr):
    """How far x lies below its maximum, and exp(factor * that). FINITE: no further than where that vanishes, since
    -inf must not be multiplied with 0.
    """
    below = x - high
    if FINITE:
        below = larger(below, scalar(bound, x.dtype))
    return below, exponential(below, factor, PRECISE)


# -- launching ---------------------------------------------------------------------------------------------------------


THREADS = 1024  # that a processor holds of kernels with up to 64 registers
SHORT = 2048  # columns of a row that one warp walks


class Pace(NamedTuple):
    """Vectors of a thread in a block, warps of a program where rows are not short, and stages of the load pipeline: the
    block that is computed with, and those on their way.

    Small blocks and programs, many of them a processor: on an H200, 4 warps of two vectors each read rows of 32,000 up
    to a third faster than 8 of four did, which leave more of a row to its unfilled last block; long rows are read at
    the speed of a copy either way.
    """

    vectors: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.vectors} vectors, {self.warps} warps, {self.stages} stages"


class Walk(NamedTuple):
    """How rows are walked: a kernel's constants, and over how many programs a row is split."""

    constants: dict[str, int | bool]
    together: bool  # rows of all tensors have the same place within a vector
    parts: int
    blocks: int  # of a part


def walk(pace: Pace, *rows: Tensor) -> Walk:
    """For tensors [B, T, V] walked together, in blocks that begin at the cache lines of the first one."""
    B, T, V = rows[0].shape
    sizes = [x.element_size() for x in rows]
    vector, vectors = VECTOR_BYTES.value // max(sizes), pace.vectors
    warps = pace.warps if V > SHORT else 1
    steps = triton.cdiv(max(V, 1), 32 * warps * vector * vectors)
    slots = processors(rows[0]) * THREADS // (32 * warps)
    blocks = triton.cdiv(steps, splits(B * T, steps, slots))
    unit = VECTOR_BYTES.value // min(sizes)
    places = [strides(x) for x in rows]
    aligned = all(n % unit == 0 for place in places for n in place)  # every row starts with a whole vector
    together = all((n - m) % unit == 0 for place in places for n, m in zip(place, places[0], strict=True))
    block = {"LANES": 32 * warps, "VECTOR": vector, "UNROLL": vectors, "num_warps": warps}
    constants = {**block, "ALIGNED": aligned, "STAGES": pace.stages}
    return Walk(constants, together, triton.cdiv(steps, blocks), blocks)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and what a row's results have."""
    return torch.promote_types(dtype, torch.float32)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of a tensor [B, T, V]: elements from the storage's start, from one b and from one t to the next."""
    b, t = (0 if n == 1 else stride for n, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
    return int(x.storage_offset()), b, t


def storage(x: Tensor) -> Tensor:
    """From its start, which is aligned wherever the tensor begins."""
    return x.as_strided(x.shape, x.stride(), 0)


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors [..., V] of one shape as [B, T, V] with stride 1 on the last axis: views, or copies where none exists."""
    *leading, V = tensors[0].shape
    unit = [x if V <= 1 or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    for k in range(max(1, len(leading))):
        try:
            return [x.view(math.prod(leading[:k]), math.prod(leading[k:]), V) for x in unit]
        except RuntimeError:  # this cut does not fit all strides
            continue
    return [x.reshape(1, math.prod(leading), V) for x in unit]


def units(temperature: float, softcap: float) -> dict[str, Any]:
    """A kernel's scalars. Kernels compute with y, the logits or, under a softcap, tanh(x / softcap); z = factor * y."""
    factor = (softcap or 1.0) / temperature
    return {
        "factor": factor,
        "bound": VANISHING.value / factor,
        "inverse": 1 / softcap if softcap else 1.0,
        "CAP": softcap != 0,
    }


def shipped_rows(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, bool, bool]]:
    """Logits of every kind that kernels are compiled for, and for which of forward and backward these are others (see
    unlearn_fast.ops.resources).
    """
    yield "long rows", torch.empty(60, 32000, dtype=dtype), True, True
    yield "split rows", torch.empty(1, 32000, dtype=dtype), True, False
    yield "rows off lines", torch.empty(60, 50257, dtype=dtype), True, True
    yield "rows apart", torch.empty(2, 31, 50257, dtype=dtype)[:, :-1], False, True
    yield "short rows", torch.empty(3000, 1000, dtype=dtype), True, True
