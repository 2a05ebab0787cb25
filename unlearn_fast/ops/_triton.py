"""What the Triton kernels share: how a gradient enters the sums, the second stage of split sums, how they are launched,
how work is split, and which tiles serve.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

WORTH_TUNING = 2**31  # floating-point operations of a call; below, the default tile serves and nothing is measured
INTERPRETED_PROCESSORS = 6  # of the GPU that CPU tensors, that is the interpreter, pretend to run on


class Tile(NamedTuple):
    """Rows and columns of a program's output tile, positions a step, warps, and stages of the load pipeline."""

    o: int
    i: int
    t: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.o} x {self.i} x {self.t}, {self.warps} warps, {self.stages} stages"


class Block(NamedTuple):
    """Elements and warps of a program that goes through memory once."""

    elements: int
    warps: int

    def __str__(self) -> str:
        return f"{self.elements} elements, {self.warps} warps"


ADDED, SCALED = Block(512, 4), Block(4096, 8)


@triton.jit
def moment(gradient, ABSOLUTE: tl.constexpr):
    return tl.abs(gradient) if ABSOLUTE else gradient * gradient


@triton.jit
def product(g, a, total, PRECISION: tl.constexpr):
    """total + g a, for g [o, t] and a [t, i]: loaded in that shape, since a transposition would keep sm_80 from loading
    ahead into shared memory.
    """
    return tl.dot(g, a, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def finish(out, place, mask, total, scale, ADD: tl.constexpr):
    """out += scale * total, or, for the part of a split sum, out = total."""
    if ADD:
        total = tl.load(out + place, mask=mask) + tl.full(total.shape, scale, total.dtype) * total
    tl.store(out + place, total, mask=mask)


@triton.jit(do_not_specialize=["S"])
def add_parts_kernel(out, parts, scale: tl.float64, S, L, M, N, part_s, out_l, out_m, out_n, BLOCK: tl.constexpr):
    """out[l, m, n] += scale * sum_s parts[s, l, m, n], in the order of s: the second stage of every sum that is split.

    One program a block of elements; reads the parts once, reads and writes out once. No atomics: two runs give the same
    bits.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = offs // N
    mask = rows < tl.cast(L, tl.int64) * M
    total = tl.zeros([BLOCK], out.dtype.element_ty)
    for s in range(S):
        total += tl.load(parts + tl.cast(s, tl.int64) * part_s + offs, mask=mask, other=0)
    finish(out, rows // M * out_l + rows % M * out_m + offs % N * out_n, mask, total, scale, ADD=True)


class Layout(NamedTuple):
    """What a tensor contributes to the choice of a launch."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def layouts(*tensors: Tensor | None) -> list[Any]:
    """The layout of each; None for None."""
    return [None if t is None else Layout(t.shape, t.stride(), t.dtype) for t in tensors]


class Launch:
    """A kernel with all its arguments but the tensors, which come first, and the scale, to be launched many times.

    Triton looks at every argument of every launch to find the compiled kernel, which takes longer than a small kernel
    runs. With tensors of one layout only their device and the alignment of their addresses can make a difference.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: int, **options: Any) -> None:
        self.kernel, self.grid, self.numbers, self.options = kernel, (*grid, 1, 1)[:3], numbers, options
        self.constants = [options[name] for name in kernel.arg_names if name in options]
        self.compiled: dict[Hashable, Any] = {}

    def __call__(self, tensors: Sequence[Tensor | TensorDescriptor | None], *scale: float) -> None:
        aligned = [t.data_ptr() % 16 == 0 if isinstance(t, Tensor) else None for t in tensors]  # descriptors always are
        key = (tensors[0].get_device(), *aligned)  # type: ignore[union-attr]
        if (compiled := self.compiled.get(key)) is not None:
            compiled[self.grid](*tensors, *scale, *self.numbers, *self.constants)
        elif compiled := self.kernel[self.grid](*tensors, *scale, *self.numbers, **self.options):  # None: interpreted
            self.compiled[key] = compiled


def add_parts(out: Tensor, parts: Tensor, scale: float) -> None:
    """out [L, M, N] += scale * parts.sum(0), for parts [S, ...] in the order of out's axes, contiguous but for S."""
    adding(*layouts(out), len(parts), parts.stride(0))((out, parts), scale)


@lru_cache(maxsize=4096)
def adding(out: Layout, parts: int, part_stride: int) -> Launch:
    """The launch of `add_parts`."""
    grid = (triton.cdiv(math.prod(out.shape), ADDED.elements),)
    numbers = parts, *out.shape, part_stride, *out.strides
    return Launch(add_parts_kernel, grid, *numbers, BLOCK=ADDED.elements, num_warps=ADDED.warps)


@triton.jit(do_not_specialize=["n"])
def scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """x *= factor, unless it is 1: then nothing is read nor written. Programs take every so many-th block."""
    by = tl.load(factor)
    if by != 1:
        wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(x + offs, mask=offs < n).to(wide) * by.to(wide)
            tl.store(x + offs, value.to(x.dtype.element_ty), mask=offs < n)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, for contiguous x and a number on the same device, which the CPU need not know."""
    with torch.cuda.device_of(x):
        grid = min(triton.cdiv(max(1, x.numel()), SCALED.elements), 8 * processors(x))
        scale_kernel[(grid,)](x, factor, x.numel(), BLOCK=SCALED.elements, num_warps=SCALED.warps)


@lru_cache(maxsize=4096)
def splits(tiles: int, steps: int, processors: int) -> int:
    """Into how many parts a sum over `steps` is split, so that tiles * parts programs end soonest.

    At most four programs a processor, which also bounds the memory of the parts.
    """
    most = max(1, min(steps, 4 * processors // tiles))
    return min(range(1, most + 1), key=lambda s: (triton.cdiv(tiles * s, processors) * triton.cdiv(steps, s), s))


def processors(tensor: Tensor) -> int:
    return _processors(tensor.device.index) if tensor.is_cuda else INTERPRETED_PROCESSORS


@lru_cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def fitting(tiles: Sequence[Tile], dtype: torch.dtype, device: torch.device) -> tuple[Tile, ...]:
    """Those whose load pipeline, for elements of this type, fits into the GPU's shared memory."""
    if device.type != "cuda":
        return tuple(tiles)
    limit = _shared_memory(device.index)
    fit = tuple(t for t in tiles if (t.o + t.i) * t.t * t.stages * dtype.itemsize <= limit)
    return fit or tuple(tiles[-1:])


def boxes(x: Tensor) -> bool:
    """Whether the GPU's copy engine can load blocks of x, [.., .., columns], by itself."""
    if not x.is_cuda or _capability(x.device.index) < (9, 0):
        return False
    *outer, last = zip(x.shape, x.stride(), strict=True)
    steps = [stride * x.element_size() for size, stride in outer if size > 1]
    return last[1] == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def box(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x, loaded [1, rows, columns] at a time; what lies outside of x is 0."""
    whole = -(-x.shape[2] * x.element_size() // 16) * 16 // x.element_size()  # a stride for an axis of size 1
    row = x.stride(1) if x.shape[1] > 1 else whole
    strides = [x.stride(0) if x.shape[0] > 1 else row * x.shape[1], row, 1]
    return TensorDescriptor(x, list(x.shape), strides, [1, rows, columns])


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _shared_memory(device: int) -> int:
    """Bytes that a program may have."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 in TF32 only where torch's setting for matrix products allows it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@lru_cache(maxsize=4096)
def default_tile(tiles: Sequence[Tile], O: int, I: int) -> Tile:  # noqa: E741
    """The tile that computes least beyond an [O, I] output; where that is equal a larger one, which loads less."""

    def cost(tile: Tile) -> float:
        area = triton.cdiv(O, tile.o) * tile.o * triton.cdiv(I, tile.i) * tile.i
        return area * (1 + 16 / tile.o + 16 / tile.i)

    return min(tiles, key=cost)


_measured: dict[Hashable, Tile] = {}


def choose(
    key: Hashable, tiles: Sequence[Tile], default: Tile, like: Tensor, work: int, launch: Callable[[Tile], object]
) -> Tile:
    """The fastest of `tiles`, measured at the first call with this key; `launch` must write to scratch memory only.

    `default`, where measuring is impossible (the interpreter, a CUDA graph's capture) or not worth it.
    """
    if key in _measured:
        return _measured[key]
    if not like.is_cuda or work < WORTH_TUNING or torch.cuda.is_current_stream_capturing():
        return default
    _measured[key] = min(tiles, key=lambda tile: _milliseconds(launch, tile))
    return _measured[key]


def _milliseconds(launch: Callable[[Tile], object], tile: Tile) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(tile), warmup=5, rep=20)
    except triton.runtime.OutOfResources:  # a GPU with less shared memory
        return float("inf")
