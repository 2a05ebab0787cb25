"""out[c] += scale * sum_b w_b (sum_t g[b, t, c] x[b, t, c])^2 on GPUs: the weight or bias of an elementwise affine map.

Fused: product, sum over positions, square, weight, sum over examples. Reads g and x once, in whichever order their
memory has; writes next to nothing, so that memory bandwidth is the ceiling.
Work: one program a block of channels and a range of examples; it sums an example's positions in registers, squares, and
adds. Where that makes too few programs (few examples, many positions), the positions are split as well: the sums of
each range go to a workspace [B, ranges, C], and the same kernel then reads those. Ranges of examples are added in a
last stage.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_fast.ops._triton import Block, Launch, Layout, adding, finish, layouts, moment, processors

BLOCK = Block(elements=2048, warps=4)  # 16 a thread and operand
FEW = 8  # blocks that one program reads in less time than a further launch takes


@triton.jit
def sum_of_positions(
    x, g, b, c, begin, end, B, C, x_b, x_t, x_c, g_b, g_t, g_c,
    DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_B, BLOCK_C]: sum_t g x over positions from begin to end, for examples b and channels c."""
    total = tl.zeros([BLOCK_B, BLOCK_T, BLOCK_C], DTYPE)
    b, c = b[:, None, None], c[None, None, :]
    mask = (b < B) & (c < C)
    for t0 in range(begin, end, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T).to(tl.int64))[None, :, None]
        inside = mask & (t < end)
        values = tl.load(g + (b * g_b + t * g_t + c * g_c), mask=inside, other=0).to(DTYPE)
        if x is not None:
            values *= tl.load(x + (b * x_b + t * x_t + c * x_c), mask=inside, other=0).to(DTYPE)
        total += values
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["B", "positions"])
def positions_kernel(
    sums, x, g, B, T, C, positions, x_b, x_t, x_c, g_b, g_t, g_c, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """sums[b, s, c] = sum_t g x over the s-th range of positions."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    range_, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = range_ * positions
    total = sum_of_positions(
        x, g, b + tl.arange(0, 1), c, begin, tl.minimum(begin + positions, T), B, C, x_b, x_t, x_c, g_b, g_t, g_c,
        sums.dtype.element_ty, 1, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    place = sums + (b * tl.num_programs(1) + range_) * C + c
    tl.store(place[None, :], total, mask=(c < C)[None, :])


@triton.jit(do_not_specialize=["B", "examples"])  # other batches need no other code
def channels_kernel(
    out, first, x, g, weights, scale: tl.float64,
    B, T, C, examples,
    out_s, out_c, first_s, first_c, x_b, x_t, x_c, g_b, g_t, g_c, weights_b,
    ADD: tl.constexpr, ABSOLUTE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_B, BLOCK_C], out.dtype.element_ty)
    total_first = total
    begin = split * examples
    end = tl.minimum(begin + examples, B)
    for b0 in range(begin, end, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        gradient = sum_of_positions(
            x, g, b, c, 0, T, end, C, x_b, x_t, x_c, g_b, g_t, g_c, out.dtype.element_ty, BLOCK_B, BLOCK_T, BLOCK_C
        )
        if weights is not None:
            w = tl.load(weights + b * weights_b, mask=b < end, other=0)[:, None]
            total += w * moment(gradient, ABSOLUTE)
            total_first += w * gradient
        else:
            total += moment(gradient, ABSOLUTE)
            total_first += gradient
    finish(out, split * out_s + c * out_c, c < C, tl.sum(total, 0), scale, ADD)
    if first is not None:
        finish(first, split * first_s + c * first_c, c < C, tl.sum(total_first, 0), scale, ADD)


def sum_grad_squared_scale_(
    out: Tensor,
    inputs: Tensor | None,
    grad_outputs: Tensor,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    """The operator; its arguments have been checked."""
    if grad_outputs.numel() == 0:
        return
    tensors = out, first, inputs, grad_outputs, weights
    with torch.cuda.device_of(out):
        _call(*layouts(*tensors), absolute, processors(out))(*tensors, scale)


class Call:
    """The launches of a call, for tensors of these layouts."""

    def __init__(
        self,
        out: Layout,
        first: Layout | None,
        x: Layout | None,
        g: Layout,
        weights: Layout | None,
        absolute: bool,
        processors: int,
    ) -> None:
        B, T, C = g.shape
        block_b, block_t, block_c = blocks(g)
        columns, wanted = triton.cdiv(C, block_c), 4 * processors
        ranges = min(triton.cdiv(T, block_t), wanted // (columns * B))
        self.positions = None
        if ranges > 1:
            positions = triton.cdiv(triton.cdiv(T, ranges), block_t) * block_t
            ranges = triton.cdiv(T, positions)
            self.positions = Launch(
                positions_kernel, (columns, ranges, B), B, T, C, positions, *_strides(x), *g.strides,
                BLOCK_T=block_t, BLOCK_C=block_c, num_warps=BLOCK.warps,
            )  # fmt: skip
            x, g, T = None, Layout((B, ranges, C), (ranges * C, C, 1), out.dtype), ranges
            block_b, block_t, block_c = blocks(g)
            columns = triton.cdiv(C, block_c)
        self.sums = g.shape
        steps = triton.cdiv(B, block_b)
        few = steps * triton.cdiv(T, block_t) <= FEW
        examples = triton.cdiv(steps, 1 if few else max(1, min(steps, wanted // columns))) * block_b
        self.parts = parts = triton.cdiv(B, examples)
        self.space = (1 if first is None else 2, parts, C)
        places = [(0, *v.strides) if parts == 1 else (C, 1) for v in (out, out if first is None else first)]
        self.channels = Launch(
            channels_kernel, (columns, parts), B, T, C, examples, *places[0], *places[1], *_strides(x), *g.strides,
            0 if weights is None else weights.strides[0], ADD=parts == 1, ABSOLUTE=absolute,
            BLOCK_B=block_b, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=BLOCK.warps,
        )  # fmt: skip
        self.adding = [
            adding(Layout((1, 1, C), (0, 0, *v.strides), v.dtype), parts, C) for v in (out, first) if v is not None
        ]

    def __call__(
        self,
        out: Tensor,
        first: Tensor | None,
        x: Tensor | None,
        g: Tensor,
        weights: Tensor | None,
        scale: float,
    ) -> None:
        if self.positions is not None:
            sums = out.new_empty(self.sums)
            self.positions((sums, x, g))
            x, g = None, sums
        if self.parts == 1:
            return self.channels((out, first, x, g, weights), scale)
        space = out.new_empty(self.space)
        self.channels((space[0], None if first is None else space[1], x, g, weights), scale)
        for add, place, parts in zip(self.adding, (out, first), space, strict=False):
            add((place, parts), scale)


_call = functools.lru_cache(maxsize=4096)(Call)


def blocks(g: Layout) -> tuple[int, int, int]:
    """Examples, positions and channels of a block: long along the axis that is contiguous in memory."""
    B, T, C = (triton.next_power_of_2(n) for n in g.shape)
    if g.strides[1] == 1 and g.strides[2] != 1:
        block_t = min(T, 256)
        block_c = min(C, BLOCK.elements // block_t)
    else:
        block_c = min(C, 128)
        block_t = min(T, BLOCK.elements // block_c)
    return min(B, BLOCK.elements // (block_t * block_c)), block_t, block_c


def _strides(x: Layout | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.strides


def shipped(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """The configurations of a few shapes, extreme ones among them (see unlearn_fast.ops.resources)."""
    wide = torch.promote_types(dtype, torch.float32)
    shapes = ((1, 4096, 128), (1, 128, 4096), (4096, 1, 128), (4096, 1, 1))
    for shape, with_first in itertools.product(shapes, (False, True)):
        g = torch.zeros(shape, dtype=dtype)
        if shape[2] > shape[1] > 1:  # channels first
            g = g.transpose(1, 2)
        out, weights = torch.zeros(g.shape[2], dtype=wide), torch.zeros(len(g), dtype=wide)
        title = " x ".join(map(str, blocks(*layouts(g)))) + (", first moment" if with_first else "")
        call = (out, g, g, weights, torch.zeros_like(out) if with_first else None, 1.0, False)
        yield title, functools.partial(sum_grad_squared_scale_, *call)
