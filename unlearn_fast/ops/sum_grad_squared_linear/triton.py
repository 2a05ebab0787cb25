"""out[o, i] += scale * sum_b w_b (sum_t g[b, t, o] a[b, t, i])^2 on GPUs.

Fused: per-example matrix product, square (or magnitude), weight, sum over examples, and the first moment beside it;
nothing of size [B, O, I] exists. Reads a and g once for every tile of the output that needs them, writes out once.
Work: one program an output tile and a range of examples. It streams through its examples' positions as one long loop,
so that the loads of the next example run during this one's last products. The example's gradient and the running sums
stay in registers; the square costs a multiplication and an addition an element for the T multiply-adds of the main
loop. Ranges of examples are added in a second stage, in order.
Where the GPU has a copy engine for blocks of tensors (sm_90 and later), it loads those of 16 bits: on an H200 that is
up to 1.3 times as fast as loads by the threads, whose addresses and masks take registers and instructions.
One position an example (T = 1) is the plain product of squares: the examples then take the place of positions.
"""
# ruff: noqa: E741 (O and I are axes)

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_fast.ops._triton import (
    Launch,
    Layout,
    Tile,
    adding,
    box,
    boxes,
    choose,
    default_tile,
    finish,
    fitting,
    layouts,
    moment,
    precision,
    processors,
    product,
    splits,
)

# Kind of products -> tiles. None but the one that says so spills registers on sm_80, sm_90 or sm_100
# (tests/test_triton_compiled.py); a first moment is one more tile of registers.
TILES = {
    "16 bit": (Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "ieee": (Tile(128, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(32, 64, 16, 4, 2)),
    "float64": (Tile(64, 64, 16, 8, 2), Tile(32, 64, 16, 4, 2)),
    # The largest one's running sums do not all fit into registers: they are touched once an example, which pays where
    # examples are long.
    "boxes": (
        Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 6), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
    ),
}  # fmt: skip
IN_REGISTERS = 128 * 128  # elements of a tile
TILES_WITH_FIRST = {kind: tuple(t for t in tiles if t.o * t.i <= 128 * 64) for kind, tiles in TILES.items()}
PRODUCT_TILES = {  # T = 1
    "tf32x3": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 16, 4, 3)),
    "tf32": TILES["tf32"],
    "ieee": (Tile(128, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2)),
    "float64": TILES["float64"],
}
PRODUCT_TILES_WITH_FIRST = {
    "tf32x3": (Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 2)),
    "tf32": TILES_WITH_FIRST["tf32"],
    "ieee": PRODUCT_TILES["ieee"],
    "float64": (Tile(64, 32, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
}


@triton.jit(do_not_specialize=["B", "examples"])  # other batches need no other code
def examples_kernel(
    out, first, a, g, weights, scale: tl.float64,
    B, T, O, I, examples,  # examples: of a program
    out_s, out_o, out_i, first_s, first_o, first_i,
    a_b, a_t, a_i, g_b, g_t, g_o, weights_b,
    ADD: tl.constexpr, ABSOLUTE: tl.constexpr, PRECISION: tl.constexpr, BOXES: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BOXES: a and g are descriptors, whose strides the copy engine knows."""
    tiles_i = tl.cdiv(I, BLOCK_I)
    o0 = (tl.program_id(0) // tiles_i).to(tl.int64) * BLOCK_O
    i0 = (tl.program_id(0) % tiles_i).to(tl.int64) * BLOCK_I
    split = tl.program_id(1).to(tl.int64)
    offs_o, offs_i, offs_t = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_T)
    mask_o, mask_i = o0 + offs_o < O, i0 + offs_i < I
    if not BOXES:
        a_tile = a + i0 * a_i + (offs_t.to(tl.int64)[:, None] * a_t + offs_i.to(tl.int64)[None, :] * a_i)
        g_tile = g + o0 * g_o + (offs_o.to(tl.int64)[:, None] * g_o + offs_t.to(tl.int64)[None, :] * g_t)
    gradient = tl.zeros([BLOCK_O, BLOCK_I], out.dtype.element_ty)
    total = gradient
    if first is not None:
        total_first = gradient

    b = split * examples
    steps = (tl.minimum(b + examples, B) - b) * tl.cdiv(T, BLOCK_T)
    t = b * 0
    for _ in range(steps):
        if BOXES:
            at = b.to(tl.int32), t.to(tl.int32)
            a_values = a.load([at[0], at[1], i0.to(tl.int32)]).reshape(BLOCK_T, BLOCK_I)
            g_values = g.load([at[0], at[1], o0.to(tl.int32)]).reshape(BLOCK_T, BLOCK_O).T
        else:
            mask_t = t + offs_t < T
            a_values = tl.load(a_tile + (b * a_b + t * a_t), mask=mask_t[:, None] & mask_i[None, :], other=0)
            g_values = tl.load(g_tile + (b * g_b + t * g_t), mask=mask_o[:, None] & mask_t[None, :], other=0)
        gradient = product(g_values, a_values, gradient, PRECISION)
        last = t + BLOCK_T >= T
        if last:
            if weights is not None:
                w = tl.load(weights + b * weights_b)
                total += w * moment(gradient, ABSOLUTE)
                if first is not None:
                    total_first += w * gradient
            else:
                total += moment(gradient, ABSOLUTE)
                if first is not None:
                    total_first += gradient
            gradient = tl.zeros([BLOCK_O, BLOCK_I], out.dtype.element_ty)
        # Outside of the branch: addresses that depended on it could not be computed, and loaded from, ahead of it.
        t = tl.where(last, 0, t + BLOCK_T)
        b = tl.where(last, b + 1, b)

    o, i, mask = (o0 + offs_o)[:, None], (i0 + offs_i)[None, :], mask_o[:, None] & mask_i[None, :]
    finish(out, split * out_s + o * out_o + i * out_i, mask, total, scale, ADD)
    if first is not None:
        finish(first, split * first_s + o * first_o + i * first_i, mask, total_first, scale, ADD)


@triton.jit
def power_of_two(magnitude, INVERSE: tl.constexpr):
    """The power of two that brings a magnitude near 1, or its inverse; both finite and normal. 1 for inf and NaN."""
    if magnitude.dtype == tl.float64:
        exponent = (magnitude.to(tl.int64, bitcast=True) >> 52) & 2047
        exponent = tl.where(exponent == 2047, 1023, tl.minimum(tl.maximum(exponent, 1), 2045))
        bits = (exponent if INVERSE else 2046 - exponent) << 52
    else:
        exponent = (magnitude.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.where(exponent == 255, 127, tl.minimum(tl.maximum(exponent, 1), 253))
        bits = (exponent if INVERSE else 254 - exponent) << 23
    return bits.to(magnitude.dtype, bitcast=True)


@triton.jit(do_not_specialize=["B", "examples"])
def products_kernel(
    out, first, a, g, weights, a_max, g_max, scale: tl.float64,
    B, O, I, examples,
    out_s, out_o, out_i, first_s, first_o, first_i,
    a_b, a_i, g_b, g_o, weights_b,
    ADD: tl.constexpr, ABSOLUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """T = 1: out[o, i] += scale * sum_b w_b g[b, o]^2 a[b, i]^2.

    Factors are squared before their product: a power of two for each column, from its largest magnitude, keeps the
    squares of large and small factors from overflowing and from vanishing.
    """
    tiles_i = tl.cdiv(I, BLOCK_I)
    o = (tl.program_id(0) // tiles_i).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tl.program_id(0) % tiles_i).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    split = tl.program_id(1).to(tl.int64)
    mask_o, mask_i = o < O, i < I
    total = tl.zeros([BLOCK_O, BLOCK_I], out.dtype.element_ty)
    if first is not None:
        total_first = total
    if not ABSOLUTE:
        a_scale = power_of_two(tl.load(a_max + i, mask=mask_i, other=1), INVERSE=False)[None, :]
        g_scale = power_of_two(tl.load(g_max + o, mask=mask_o, other=1), INVERSE=False)[:, None]

    begin = split * examples
    end = tl.minimum(begin + examples, B)
    for b0 in range(begin, end, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        mask_b = b < end
        a_values = tl.load(a + (b[:, None] * a_b + i[None, :] * a_i), mask=mask_b[:, None] & mask_i[None, :], other=0)
        g_values = tl.load(g + (o[:, None] * g_o + b[None, :] * g_b), mask=mask_o[:, None] & mask_b[None, :], other=0)
        a_values, g_values = a_values.to(total.dtype), g_values.to(total.dtype)
        if ABSOLUTE:
            a_moment, g_moment = tl.abs(a_values), tl.abs(g_values)
        else:
            a_moment, g_moment = a_values * a_scale, g_values * g_scale
            a_moment, g_moment = a_moment * a_moment, g_moment * g_moment
        if weights is not None:
            w = tl.load(weights + b * weights_b, mask=mask_b, other=0)[None, :]
            g_moment *= w
            g_values *= w
        total = product(g_moment, a_moment, total, PRECISION)
        if first is not None:
            total_first = product(g_values, a_values, total_first, PRECISION)

    if not ABSOLUTE:
        a_unit = power_of_two(tl.load(a_max + i, mask=mask_i, other=1), INVERSE=True)[None, :]
        g_unit = power_of_two(tl.load(g_max + o, mask=mask_o, other=1), INVERSE=True)[:, None]
        unit = g_unit * a_unit
        total = tl.where(total == 0, 0, total * unit * unit)  # the unit may be infinite
    mask = mask_o[:, None] & mask_i[None, :]
    finish(out, split * out_s + o[:, None] * out_o + i[None, :] * out_i, mask, total, scale, ADD)
    if first is not None:
        place = split * first_s + o[:, None] * first_o + i[None, :] * first_i
        finish(first, place, mask, total_first, scale, ADD)


def sum_grad_squared_linear_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    """The operator; its arguments have been checked."""
    if out.numel() == 0 or inputs.numel() == 0 or grad_outputs.numel() == 0:
        return
    if inputs.dim() == 2:
        inputs, grad_outputs = inputs.unsqueeze(1), grad_outputs.unsqueeze(1)
    tensors = out, first, inputs, grad_outputs, weights
    with torch.cuda.device_of(out):
        by_boxes = inputs.element_size() == 2 and inputs.shape[1] > 1 and boxes(inputs) and boxes(grad_outputs)
        call = _call(*layouts(*tensors), absolute, precision(inputs.dtype), out.device, processors(out), by_boxes)
        call(*tensors, scale)


class Launches(NamedTuple):
    """Of one tile: the sums over ranges of examples, the shape of a workspace for these, and what adds them up."""

    sums: Launch
    space: tuple[int, ...] | None  # None: one range, which is added at once
    adding: list[Launch]


class Call:
    """What a call needs, for tensors of these layouts."""

    def __init__(
        self,
        out: Layout,
        first: Layout | None,
        a: Layout,
        g: Layout,
        weights: Layout | None,
        absolute: bool,
        precision: str,
        device: torch.device,
        processors: int,
        by_boxes: bool = False,
    ) -> None:
        self.out, self.first, self.a, self.g, self.weights = out, first, a, g, weights
        self.absolute, self.processors, self.by_boxes = absolute, processors, by_boxes
        (self.B, self.T, self.I), self.O = a.shape, g.shape[-1]
        self.single = self.T == 1
        self.wide = torch.promote_types(a.dtype, torch.float32)
        kind = {2: "16 bit", 4: precision, 8: "float64"}[a.dtype.itemsize]
        if self.single and kind == "16 bit":
            kind = precision = "tf32x3"  # a 16-bit float's square has more digits than TF32: two pieces hold it
        self.precision = precision
        if by_boxes:
            kind = "boxes"
        tiles = (PRODUCT_TILES, PRODUCT_TILES_WITH_FIRST) if self.single else (TILES, TILES_WITH_FIRST)
        self.tiles = fitting(tiles[first is not None][kind], a.dtype, device)
        in_registers = tuple(tile for tile in self.tiles if tile.o * tile.i <= IN_REGISTERS)
        self.default = default_tile(in_registers, self.O, self.I)
        steps = (self.T - 1).bit_length()  # how long examples are decides, too
        self.key = (self.O, self.I, steps, precision, by_boxes, a.dtype, first is None, device)
        self.work = 2 * self.B * self.T * self.O * self.I
        self.launches: dict[Tile, Launches] = {}

    def __call__(
        self, out: Tensor, first: Tensor | None, a: Tensor, g: Tensor, weights: Tensor | None, scale: float
    ) -> None:
        operands = self.operands(a, g, weights)

        def measure(tile: Tile) -> None:
            scratch = [None if v is None else v.new_empty_strided(v.shape, v.stride()) for v in (out, first)]
            self.launch(tile, scratch, operands, scale)

        tile = choose(self.key, self.tiles, self.default, out, self.work, measure)
        self.launch(tile, [out, first], operands, scale)

    def operands(self, a: Tensor, g: Tensor, weights: Tensor | None) -> list[Tensor | None]:
        """What the kernel reads: for one position an example also the largest magnitudes of each column."""
        if not self.single:
            return [a, g, weights]
        if self.absolute:
            return [a, g, weights, None, None]
        norm = torch.linalg.vector_norm
        return [a, g, weights, *(norm(x[:, 0], torch.inf, 0, dtype=self.wide) for x in (a, g))]

    def launch(self, tile: Tile, moments: list[Tensor | None], operands: list[Any], scale: float) -> None:
        """moments: out and first."""
        if tile not in self.launches:
            self.launches[tile] = self._launches(tile)
        sums, space, adding = self.launches[tile]
        if self.by_boxes:
            a, g, weights = operands
            operands = [box(a, self._block_t(tile), tile.i), box(g, self._block_t(tile), tile.o), weights]
        if space is None:
            return sums([*moments, *operands], scale)
        parts: Any = moments[0].new_empty(space)  # type: ignore[union-attr]
        sums([parts[0], None if moments[1] is None else parts[1], *operands], 1.0)
        for add, out, part in zip(adding, moments, parts, strict=False):
            add((out, part), scale)

    def _block_t(self, tile: Tile) -> int:
        return max(16, min(tile.t, triton.next_power_of_2(self.T)))

    def _launches(self, tile: Tile) -> Launches:
        tiles = triton.cdiv(self.O, tile.o) * triton.cdiv(self.I, tile.i)
        unit = tile.t if self.single else 1  # examples that a program takes at a time
        parts = splits(tiles, triton.cdiv(self.B, unit), self.processors)
        examples = triton.cdiv(triton.cdiv(self.B, unit), parts) * unit
        parts = triton.cdiv(self.B, examples)
        moments = [v for v in (self.out, self.first) if v is not None]
        if parts == 1:
            places = [(0, *v.strides) for v in moments]
        else:
            places = [(self.O * self.I, self.I, 1) for _ in moments]
        strides_w = 0 if self.weights is None else self.weights.strides[0]
        options = {
            "ADD": parts == 1, "ABSOLUTE": self.absolute, "PRECISION": self.precision,
            "BLOCK_O": tile.o, "BLOCK_I": tile.i, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        strides = *places[0], *places[-1]
        if self.single:
            (a_b, _, a_i), (g_b, _, g_o) = self.a.strides, self.g.strides
            sums = Launch(
                products_kernel, (tiles, parts), self.B, self.O, self.I, examples, *strides,
                a_b, a_i, g_b, g_o, strides_w, **options, BLOCK_B=tile.t,
            )  # fmt: skip
        else:
            sums = Launch(
                examples_kernel, (tiles, parts), self.B, self.T, self.O, self.I, examples, *strides,
                *self.a.strides, *self.g.strides, strides_w,
                **options, BOXES=self.by_boxes, BLOCK_T=self._block_t(tile),
            )  # fmt: skip
        if parts == 1:
            return Launches(sums, None, [])
        shape = 1, self.O, self.I
        second = [adding(Layout(shape, (0, *v.strides), v.dtype), parts, self.O * self.I) for v in moments]
        return Launches(sums, (len(moments), parts, self.O, self.I), second)


_call = functools.lru_cache(maxsize=4096)(Call)


def shipped(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every configuration that a call may use: its title, and a launch (see unlearn_fast.ops.resources)."""
    wide = torch.promote_types(dtype, torch.float32)
    for T, with_first, by_boxes in itertools.product((64, 1), (False, True), (False, True)):
        if by_boxes and (T == 1 or dtype.itemsize != 2):
            continue
        a, g = torch.zeros(2, T, 256, dtype=dtype), torch.zeros(2, T, 256, dtype=dtype)
        out, weights = torch.zeros(256, 256, dtype=wide), torch.zeros(2, dtype=wide)
        first = torch.zeros_like(out) if with_first else None
        settings = False, precision(dtype), out.device, processors(out), by_boxes
        call = _call(*layouts(out, first, a, g, weights), *settings)
        operands = call.operands(a, g, weights)
        for tile in call.tiles:
            title = f"{tile}, boxes" if by_boxes else f"{tile}"
            title += ", first moment" if with_first else ""
            yield title, functools.partial(call.launch, tile, [out, first], operands, 1.0)
