"""out[v, h] += scale * sum_b w_b (sum over t with tokens[b, t] = v of g[b, t, h])^2 on GPUs.

Fused: the sum over a token's repetitions in an example, square, weight, sum over examples. Reads each row of g once,
reads and writes the rows of out whose tokens occur; nothing of size [B, V, H], no copy of g.
Work: the tokens of all examples are sorted (stable, so that a token's positions stay in order), which lists each
token's rows together, example after example. One program such a list and a block of H: it walks down the list and
squares whenever an example ends. A row of out belongs to one program: no atomics, two runs give the same bits. A list
is as long as its token is frequent, so rows are loaded several at a time.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_fast.ops._triton import finish, moment

ROWS = 8  # loaded before the first of them is needed
COLUMNS = 512  # of a program, 4 a thread


@triton.jit
def tokens_kernel(
    out, first, tokens, order, ends, g, weights, scale: tl.float64,
    T, V, H, out_v, out_h, first_v, first_h, g_b, g_t, g_h, weights_b,
    ABSOLUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """tokens: sorted; order: where in [B * T] each of them was; ends: where each one's list ends."""
    start = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + start).to(tl.int64)
    before = tl.load(tokens + start - 1, mask=start > 0, other=-1).to(tl.int64)
    if (token != before) & (token >= 0) & (token < V):  # the first of its list; negative tokens are skipped
        h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = h < H
        end = tl.load(ends + start)
        gradient = tl.zeros([BLOCK_H], out.dtype.element_ty)
        total = gradient
        total_first = gradient
        example = tl.full([], -1, tl.int64)
        w = tl.full([], 0, out.dtype.element_ty)
        for chunk in range(start, end, ROWS):
            for row in tl.static_range(ROWS):
                inside = chunk + row < end
                place = tl.load(order + chunk + row, mask=inside, other=0)
                b = tl.where(inside, place // T, example)
                values = tl.load(g + b * g_b + place % T * g_t + h * g_h, mask=mask & inside, other=0)
                ended = b != example
                total = tl.where(ended, total + w * moment(gradient, ABSOLUTE), total)
                if first is not None:
                    total_first = tl.where(ended, total_first + w * gradient, total_first)
                gradient = tl.where(ended, 0, gradient) + values.to(gradient.dtype)
                if weights is not None:
                    w = tl.load(weights + b * weights_b)
                else:
                    w = tl.full([], 1, w.dtype)
                example = b
        total += w * moment(gradient, ABSOLUTE)
        finish(out, token * out_v + h * out_h, mask, total, scale, ADD=True)
        if first is not None:
            total_first += w * gradient
            finish(first, token * first_v + h * first_h, mask, total_first, scale, ADD=True)


def sum_grad_squared_embedding_(
    out: Tensor,
    tokens: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    """The operator; its arguments have been checked. An assertion on the device checks the tokens' values."""
    if out.numel() == 0 or tokens.numel() == 0:
        return
    V, H = out.shape
    with torch.cuda.device_of(out):
        ordered, order = torch.sort(tokens.reshape(-1), stable=True)
        ends = torch.searchsorted(ordered, ordered, right=True)
        torch._assert_async(ordered[-1] < V)
        block = min(COLUMNS, max(32, triton.next_power_of_2(H)))
        tokens_kernel[(len(ordered), triton.cdiv(H, block))](
            out, first, ordered, order, ends, grad_outputs, weights, scale, tokens.shape[1], V, H, *out.stride(),
            *(out if first is None else first).stride(), *grad_outputs.stride(),
            0 if weights is None else weights.stride(0), ABSOLUTE=absolute, ROWS=ROWS, BLOCK_H=block,
            num_warps=max(1, block // 128),
        )  # fmt: skip


def shipped(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every configuration that a call may use: its title, and a launch (see unlearn_fast.ops.resources)."""
    wide = torch.promote_types(dtype, torch.float32)
    for H in (32, 64, 128, 256, 512):
        for first in (None, torch.zeros(16, H, dtype=wide)):
            out, tokens = torch.zeros(16, H, dtype=wide), torch.zeros(2, 16, dtype=torch.int64)
            call = (out, tokens, torch.zeros(2, 16, H, dtype=dtype), torch.zeros(2, dtype=wide), first, 1.0, False)
            title = f"{H} columns" + (", first moment" if first is not None else "")
            yield title, functools.partial(sum_grad_squared_embedding_, *call)
