"""out[o, c, k] += scale * sum_b w_b (sum_p g[b, o, p] x[b, c, p stride + k dilation - padding])^2 on GPUs: the squared
per-example weight gradients of a convolution with up to three spatial axes; p runs over an example's images, too.

Fused: as in sum_grad_squared_linear's kernel, with channels times kernel taps for I and images times positions for T
(an implicit matrix product): x is read where it lies, and no unfolded copy exists. Reads g and x once for every tile of
the output that needs them (every tap is one).
Work: one program a group, an output tile and a range of examples, streamed as one long loop. Its sums go to a
workspace [ranges, O, taps, C], in whose order tiles are written fast, and a second stage adds those to out. Where a
group has enough channels, a tile has one tap, so that the padding's mask depends on the position alone; else the tile
mixes taps. Channels are wanted innermost in memory, for wide loads: an x in another order is copied into it first. A
kernel of one tap without padding is a linear layer.
"""
# ruff: noqa: E741 (O and I are axes)

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_fast.ops._triton import (
    Launch,
    Layout,
    Tile,
    add_parts,
    choose,
    default_tile,
    fitting,
    layouts,
    moment,
    precision,
    processors,
    product,
    splits,
)
from unlearn_fast.ops.sum_grad_squared_linear.triton import sum_grad_squared_linear_

# As for linear layers; the narrow ones are for groups of few channels, depthwise convolutions above all.
TILES = {
    "16 bit": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(16, 32, 64, 4, 3)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(16, 32, 64, 4, 3)),
    "ieee": (Tile(128, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(16, 32, 32, 4, 2)),
    "float64": (Tile(64, 64, 16, 8, 2), Tile(32, 64, 16, 4, 2), Tile(16, 32, 16, 4, 2)),
}
TILES_WITH_FIRST = {kind: tuple(t for t in tiles if t.o * t.i <= 128 * 64) for kind, tiles in TILES.items()}


@triton.jit(do_not_specialize=["B", "examples"])  # other batches need no other code
def images_kernel(
    parts, parts_first, x, g, weights,
    B, T, O, C, examples,  # T: images times positions; O, C: of a group; examples: of a program
    P, n1, n2,  # positions: all, and of the last two axes
    size0, size1, size2, kernel0, kernel1, kernel2,
    stride0, stride1, stride2, padding0, padding1, padding2, dilation0, dilation1, dilation2,
    part_s, x_b, x_w, x_c, x_0, x_1, x_2, g_b, g_w, g_o, g_p, weights_b,
    ABSOLUTE: tl.constexpr, PRECISION: tl.constexpr,
    AXES: tl.constexpr, PADDED: tl.constexpr, ONE_TAP: tl.constexpr, ONE_IMAGE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    taps = kernel0 * kernel1 * kernel2
    tiles_c = tl.cdiv(C, BLOCK_I)
    tiles_i = taps * tiles_c if ONE_TAP else tl.cdiv(taps * C, BLOCK_I)
    tiles_o = tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0)
    group = (tile // (tiles_i * tiles_o)).to(tl.int64)
    tile = tile % (tiles_i * tiles_o)
    o = (tile // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    tile = tile % tiles_i
    if ONE_TAP:
        tap = tile // tiles_c
        c = (tile % tiles_c) * BLOCK_I + tl.arange(0, BLOCK_I)
        mask_i = c < C
    else:  # the channel runs faster than the tap
        i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        tap = (i // C)[None, :]
        c = i % C
        mask_i = i < taps * C
    mask_o = o < O
    shift0 = tap // (kernel1 * kernel2) * dilation0
    shift1 = tap // kernel2 % kernel1 * dilation1
    shift2 = tap % kernel2 * dilation2
    x += group * C * x_c
    g += group * O * g_o
    x_columns = c[None, :].to(tl.int64) * x_c + (
        tl.cast(shift0, tl.int64) * x_0 + tl.cast(shift1, tl.int64) * x_1 + tl.cast(shift2, tl.int64) * x_2
    )
    g_rows = o[:, None].to(tl.int64) * g_o
    offs_t = tl.arange(0, BLOCK_T)
    gradient = tl.zeros([BLOCK_O, BLOCK_I], parts.dtype.element_ty)
    total = gradient
    if parts_first is not None:
        total_first = gradient

    split = tl.program_id(1).to(tl.int64)
    b = split * examples
    steps = (tl.minimum(b + examples, B) - b) * tl.cdiv(T, BLOCK_T)
    t0 = tl.program_id(1) * 0
    for _ in range(steps):
        t = t0 + offs_t
        mask_t = t < T
        position = t if ONE_IMAGE else t % P
        g_columns = position.to(tl.int64) * g_p
        p = position[:, None]
        position2 = p % n2 * stride2 - padding2
        position1 = p // n2 % n1 * stride1 - padding1
        position0 = p // (n2 * n1) * stride0 - padding0
        x_rows = position0.to(tl.int64) * x_0 + position1.to(tl.int64) * x_1 + position2.to(tl.int64) * x_2
        if not ONE_IMAGE:
            w = (t // P).to(tl.int64)
            x_rows += w[:, None] * x_w
            g_columns += w * g_w
        inside = mask_t[:, None]
        if PADDED:
            inside &= (position2 + shift2 >= 0) & (position2 + shift2 < size2)
            if AXES >= 2:
                inside &= (position1 + shift1 >= 0) & (position1 + shift1 < size1)
            if AXES >= 3:
                inside &= (position0 + shift0 >= 0) & (position0 + shift0 < size0)
        x_values = tl.load(x + b * x_b + (x_rows + x_columns), mask=inside & mask_i[None, :], other=0)
        g_values = tl.load(g + b * g_b + (g_rows + g_columns[None, :]), mask=mask_o[:, None] & mask_t[None, :], other=0)
        gradient = product(g_values, x_values, gradient, PRECISION)
        last = t0 + BLOCK_T >= T
        if last:
            if weights is not None:
                w_b = tl.load(weights + b * weights_b)
                total += w_b * moment(gradient, ABSOLUTE)
                if parts_first is not None:
                    total_first += w_b * gradient
            else:
                total += moment(gradient, ABSOLUTE)
                if parts_first is not None:
                    total_first += gradient
            gradient = tl.zeros([BLOCK_O, BLOCK_I], parts.dtype.element_ty)
        # Outside of the branch: addresses that depended on it could not be computed, and loaded from, ahead of it.
        t0 = tl.where(last, 0, t0 + BLOCK_T)
        b = tl.where(last, b + 1, b)

    place = split * part_s + (group * O + o[:, None]) * (C * taps) + (tap * C + c[None, :])
    mask = mask_o[:, None] & mask_i[None, :]
    tl.store(parts + place, total, mask=mask)
    if parts_first is not None:
        tl.store(parts_first + place, total_first, mask=mask)


@dataclass(frozen=True)
class Geometry:
    """A convolution's numbers, three of each: missing axes come first and have size 1."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int
    axes: int


def sum_grad_squared_conv_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    """The operator, inputs [B, W, C, *in]; its arguments have been checked."""
    if out.numel() == 0 or inputs.numel() == 0 or grad_outputs.numel() == 0:
        return
    x, g = inputs, grad_outputs
    axes = len(stride)
    if groups == 1 and math.prod(out.shape[2:]) == 1 and not any(padding):
        for axis, step in enumerate(stride):
            x = x.unfold(3 + axis, 1, step).squeeze(-1)  # every step-th
        x, g = (v.flatten(3).transpose(2, 3).flatten(1, 2) for v in (x, g))
        taps = [None if v is None else v.flatten(2).squeeze(2) for v in (out, first)]
        assert taps[0] is not None
        return sum_grad_squared_linear_(taps[0], x, g, weights, taps[1], scale, absolute)
    with torch.cuda.device_of(out):
        for _ in range(3 - axes):
            x = x.unsqueeze(3)
        ones = [1] * (3 - axes)
        geometry = Geometry(
            (*ones, *stride), (*[0] * (3 - axes), *padding), (*ones, *dilation), (*ones, *out.shape[2:]), groups, axes
        )
        positions = (*ones, *g.shape[3:])
        flat = [None if v is None else v.flatten(2) for v in (out, first)]  # a copy, where memory has no such view
        Call(x, g.flatten(3), positions, geometry, weights, absolute, first is not None).run(flat, scale)
        for v, place in zip((out, first), flat, strict=True):
            if v is not None and place is not None and place.data_ptr() != v.data_ptr():
                v.copy_(place.view(v.shape))


class Call:
    """One call's operands, and what depends on them."""

    def __init__(
        self,
        x: Tensor,  # [B, W, C, in0, in1, in2]
        g: Tensor,  # [B, W, O, P]
        positions: tuple[int, ...],  # before they became one axis
        geometry: Geometry,
        weights: Tensor | None,
        absolute: bool,
        with_first: bool,
    ) -> None:
        self.C, self.O = x.shape[2] // geometry.groups, g.shape[2] // geometry.groups
        self.taps = math.prod(geometry.kernel)
        if x.stride(2) != 1 and self.C >= 16:
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        self.x, self.g, self.positions, self.geometry = x, g, positions, geometry
        self.weights, self.absolute, self.with_first = weights, absolute, with_first
        self.B, self.T = x.shape[0], g.shape[1] * g.shape[3]
        self.precision = precision(x.dtype)
        kind = {2: "16 bit", 4: self.precision, 8: "float64"}[x.element_size()]
        self.tiles = fitting((TILES, TILES_WITH_FIRST)[with_first][kind], x.dtype, x.device)

    def run(self, places: list[Tensor | None], scale: float) -> None:
        """places: out and first as [O, C, taps]."""
        out = places[0]
        assert out is not None
        key = (self.geometry, self.O, self.C, self.precision, self.x.dtype, places[1] is None, self.x.device)
        work = 2 * self.B * self.T * out.numel()
        default = default_tile(self.tiles, self.O, self.C * self.taps)
        tile = choose(key, self.tiles, default, out, work, self.launch)
        for place, parts in zip(places, self.launch(tile), strict=True):
            if place is not None and parts is not None:
                add_parts(place.transpose(1, 2), parts, scale)

    def launch(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """The sums over each range of examples, [ranges, groups * O, taps, C], and those of the first moment."""
        x, g, weights = self.x, self.g, self.weights
        settings = self.absolute, self.with_first, self.precision, processors(x)
        images, space = _images(*layouts(x, g, weights), self.positions, self.geometry, tile, *settings)
        parts = x.new_empty(space, dtype=torch.promote_types(x.dtype, torch.float32))
        parts, parts_first = parts[0], parts[1] if self.with_first else None
        images((parts, parts_first, x, g, weights))
        return parts, parts_first


@functools.lru_cache(maxsize=4096)
def _images(
    x: Layout,
    g: Layout,
    weights: Layout | None,
    positions: tuple[int, ...],
    shape: Geometry,
    tile: Tile,
    absolute: bool,
    with_first: bool,
    precision: str,
    processors: int,
) -> tuple[Launch, tuple[int, ...]]:
    """A call's launch, and the shape of its workspace."""
    C, O = x.shape[2] // shape.groups, g.shape[2] // shape.groups
    B, T, taps = x.shape[0], g.shape[1] * g.shape[3], math.prod(shape.kernel)
    mixed, single = triton.cdiv(C * taps, tile.i), taps * triton.cdiv(C, tile.i)
    one_tap = single <= 1.25 * mixed
    tiles = shape.groups * triton.cdiv(O, tile.o) * (single if one_tap else mixed)
    examples = triton.cdiv(B, splits(tiles, B, processors))
    ranges = triton.cdiv(B, examples)
    launch = Launch(
        images_kernel, (tiles, ranges), B, T, O, C, examples, g.shape[3], *positions[1:],
        *x.shape[3:], *shape.kernel, *shape.stride, *shape.padding, *shape.dilation,
        shape.groups * O * taps * C, *x.strides, *g.strides, 0 if weights is None else weights.strides[0],
        ABSOLUTE=absolute, PRECISION=precision, AXES=shape.axes, PADDED=any(shape.padding),
        ONE_TAP=one_tap, ONE_IMAGE=g.shape[1] == 1, BLOCK_O=tile.o, BLOCK_I=tile.i,
        BLOCK_T=max(16, min(tile.t, triton.next_power_of_2(T))), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return launch, (1 + with_first, ranges, shape.groups * O, taps, C)


def shipped(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """3 x 3 kernels on images, in every tile, of many and of few channels (see unlearn_fast.ops.resources)."""
    wide = torch.promote_types(dtype, torch.float32)
    for channels in (256, 32):
        geometry = Geometry((1, 1, 1), (0, 1, 1), (1, 1, 1), (1, 3, 3), 1, 2)
        x, g = torch.zeros(2, 1, channels, 1, 16, 16, dtype=dtype), torch.zeros(2, 1, 256, 256, dtype=dtype)
        for with_first in (False, True):
            call = Call(x, g, (1, 16, 16), geometry, torch.zeros(2, dtype=wide), False, with_first)
            for tile in call.tiles:
                mixed = "" if channels >= tile.i else ", taps mixed"
                title = f"{tile}{mixed}" + (", first moment" if with_first else "")
                yield title, functools.partial(call.launch, tile)
