"""Divergence of the logits' softmax p from a teacher's q, sum_j q_j (log q_j - log p_j), and its gradient on GPUs.

Forward, fused: softcap, temperature and the penalty on the teacher's label, running maxima and sums of exponentials of
both rows, and the sum of q_j times the difference of the logits, from which the divergence follows without a log p_j.
Reads both rows once, a block at a time (unlearn_fast.ops._triton_rows tells how), and writes a few scalars.
Backward, fused: both softmaxes from the saved maxima and log-sums, their difference, temperature and softcap. Reads
both rows once and writes the gradient once; that may be the logits' own memory.
Work: one program a row; where those are too few, a row is split over several, and the forward's sums over its parts are
merged by a second kernel, all at once and always in the same order: no atomics, and two runs give the same bits.
Rows to be ignored are not read. A label out of range cannot raise here: its row's results and gradient are NaN.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_fast.ops._triton_rows import (
    VANISHING,
    Pace,
    as_rows,
    at_vector,
    before_line,
    block_max,
    block_sum,
    capped,
    columns,
    exponential,
    label_of,
    lanes,
    larger,
    lowest,
    scalar,
    shipped_rows,
    start_of,
    storage,
    strides,
    uncapped,
    units,
    walk,
    weights,
    wide,
)

PACE = Pace(vectors=2, warps=4, stages=4)  # of each of two rows


@triton.jit
def weighted(weight, x):
    """weight * x, where what has no weight does not count, be it infinite."""
    return tl.where(weight == 0, 0, weight * x)


@triton.jit
def sunk(t_total, t_weight, cross, fall, t_fall):
    """The cross term of an old block, whose maxima lie `fall` and `t_fall` below new ones."""
    moved = tl.where(t_total == 0, 0, (t_fall - fall) * t_total)
    return weighted(t_weight, cross + moved)


@triton.jit
def with_block(high, total, t_high, t_total, cross, y, t, factor, bound, PRECISE: tl.constexpr):
    """The lanes' sums with a block: of e = exp(factor * (y - high)), of the teacher's likewise, and of the teacher's
    times (t - t_high) - (y - high), which stays small where the two lie far apart.
    """
    new, t_new = larger(high, block_max(y)), larger(t_high, block_max(t))
    _, weight = weights(high, new, factor, bound, PRECISE, PRECISE)
    _, t_weight = weights(t_high, t_new, factor, bound, PRECISE, PRECISE)
    top, t_top = new[None, :, None], t_new[None, :, None]
    _, e = weights(y, top, factor, bound, PRECISE, PRECISE)
    _, q = weights(t, t_top, factor, bound, PRECISE, PRECISE)
    cross = sunk(t_total, t_weight, cross, high - new, t_high - t_new) + block_sum(weighted(q, (t - t_top) - (y - top)))
    return new, weight * total + block_sum(e), t_new, t_weight * t_total + block_sum(q), cross


@triton.jit
def merged(high, total, t_high, t_total, cross, factor, bound):
    """Lanes' sums as one."""
    top, t_top = tl.reduce(high, 0, larger), tl.reduce(t_high, 0, larger)
    _, weight = weights(high, top, factor, bound, True, True)
    _, t_weight = weights(t_high, t_top, factor, bound, True, True)
    cross = sunk(t_total, t_weight, cross, high - top, t_high - t_top)
    return top, tl.sum(weight * total, 0), t_top, tl.sum(t_weight * t_total, 0), tl.sum(cross, 0)


@triton.jit
def store_row(
    kl, row_max, log_sum, teacher_max, teacher_log_sum,
    row, label, ignored, high, total, t_high, t_total, cross, factor,
):  # fmt: skip
    unit = scalar(factor, high.dtype)
    high, t_high = tl.where(total == 0, float("-inf"), high), tl.where(t_total == 0, float("-inf"), t_high)
    logarithm, t_logarithm = tl.log(total), tl.log(t_total)
    value = cross / t_total * unit + (logarithm - t_logarithm)
    wrong = label < 0
    tl.store(kl + row, tl.where(ignored, 0, tl.where(wrong, float("nan"), value)))
    tl.store(row_max + row, tl.where(ignored, 0, tl.where(wrong, float("nan"), high * unit)))
    tl.store(log_sum + row, tl.where(ignored, 0, logarithm))
    tl.store(teacher_max + row, tl.where(ignored, 0, t_high * unit))
    tl.store(teacher_log_sum + row, tl.where(ignored, 0, t_logarithm))


@triton.jit(do_not_specialize=["T", "x_0", "x_b", "x_t", "t_0", "t_b", "t_t", "ignore_index", "blocks"])
def forward_kernel(
    kl, row_max, log_sum, teacher_max, teacher_log_sum, parts,  # parts: [5, N, programs of a row], or None for one
    logits, teacher, labels, T, V, x_0: tl.int64, x_b: tl.int64, x_t: tl.int64,
    t_0: tl.int64, t_b: tl.int64, t_t: tl.int64, ignore_index: tl.int64, blocks, penalty: tl.float64,
    factor: tl.float64, bound: tl.float64, inverse: tl.float64,
    CAP: tl.constexpr, PENALTY: tl.constexpr, PRECISE: tl.constexpr, ALIGNED: tl.constexpr, TOGETHER: tl.constexpr,
    STAGES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = LANES * VECTOR * UNROLL
    DTYPE: tl.constexpr = kl.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    label, ignored = label_of(labels, row, V, ignore_index)
    start, t_start = start_of(row, T, x_0, x_b, x_t), start_of(row, T, t_0, t_b, t_t)
    lead = before_line(logits, start, V, ALIGNED)
    offs = lanes(LANES, VECTOR, UNROLL)
    less = scalar(penalty, DTYPE)
    high, total = lowest(LANES, DTYPE), tl.zeros([LANES], DTYPE)
    t_high, t_total, cross = high, total, total

    first = tl.program_id(1) * blocks
    last = tl.where(ignored, first, tl.minimum(first + blocks, tl.cdiv(V, BLOCK)))
    full = tl.minimum(last, (V - lead) // BLOCK)
    for block in tl.range(first, full, num_stages=STAGES):
        place = block * BLOCK
        y = tl.load(at_vector(logits, start + lead, True) + place + offs).to(DTYPE)
        t = tl.load(at_vector(teacher, t_start + lead, TOGETHER) + place + offs).to(DTYPE)
        y = capped(y, inverse, CAP)
        t = capped(t, inverse, CAP)
        if PENALTY:
            t = tl.where(offs == label - lead - place, t - less, t)
        high, total, t_high, t_total, cross = with_block(
            high, total, t_high, t_total, cross, y, t, factor, bound, PRECISE
        )
    for block in range(tl.maximum(first, full), last):  # the end of the row, and its start before the first line
        place = block * BLOCK + offs
        column = columns(place, lead, V, ALIGNED)
        inside = place < V
        y = tl.load(at_vector(logits, start, ALIGNED) + column, mask=inside, other=0).to(DTYPE)
        t = tl.load(at_vector(teacher, t_start, ALIGNED) + column, mask=inside, other=0).to(DTYPE)
        y = capped(y, inverse, CAP)
        t = capped(t, inverse, CAP)
        if PENALTY:
            t = tl.where(column == label, t - less, t)
        y, t = tl.where(inside, y, float("-inf")), tl.where(inside, t, float("-inf"))
        high, total, t_high, t_total, cross = with_block(
            high, total, t_high, t_total, cross, y, t, factor, bound, PRECISE
        )

    high, total, t_high, t_total, cross = merged(high, total, t_high, t_total, cross, factor, bound)
    if parts is None:
        store_row(
            kl, row_max, log_sum, teacher_max, teacher_log_sum, row, label, ignored, high, total, t_high, t_total,
            cross, factor,
        )  # fmt: skip
    else:
        count = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        place = parts + row * tl.num_programs(1) + tl.program_id(1)
        tl.store(place, high)
        tl.store(place + count, total)
        tl.store(place + 2 * count, t_high)
        tl.store(place + 3 * count, t_total)
        tl.store(place + 4 * count, cross)


@triton.jit(do_not_specialize=["V", "ignore_index", "P"])
def merge_kernel(
    kl, row_max, log_sum, teacher_max, teacher_log_sum, parts, labels, V, ignore_index: tl.int64, P,
    factor: tl.float64, bound: tl.float64, PARTS: tl.constexpr,
):  # fmt: skip
    """One program a row: its P parts as lanes, merged."""
    row = tl.program_id(0).to(tl.int64)
    label, ignored = label_of(labels, row, V, ignore_index)
    offs, count = tl.arange(0, PARTS), tl.num_programs(0).to(tl.int64) * P
    place, mask = parts + row * P + offs, offs < P
    nothing = lowest(PARTS, kl.dtype.element_ty)
    high = tl.where(mask, tl.load(place, mask=mask, other=0), nothing)
    t_high = tl.where(mask, tl.load(place + 2 * count, mask=mask, other=0), nothing)
    total = tl.load(place + count, mask=mask, other=0)
    t_total = tl.load(place + 3 * count, mask=mask, other=0)
    cross = tl.load(place + 4 * count, mask=mask, other=0)
    high, total, t_high, t_total, cross = merged(high, total, t_high, t_total, cross, factor, bound)
    store_row(
        kl, row_max, log_sum, teacher_max, teacher_log_sum, row, label, ignored, high, total, t_high, t_total, cross,
        factor,
    )  # fmt: skip


@triton.jit
def gradient(
    y, t, g, row_max, log_sum, teacher_max, teacher_log_sum, factor, inverse, CAP: tl.constexpr, PRECISE: tl.constexpr
):
    unit = scalar(factor, y.dtype)
    log_p = larger((y * unit - row_max) - log_sum, VANISHING)
    log_q = larger((t * unit - teacher_max) - teacher_log_sum, VANISHING)
    dz = g * (exponential(log_p, 1.0, PRECISE) - exponential(log_q, 1.0, PRECISE))
    return uncapped(dz, y, factor, inverse, CAP)


@triton.jit(
    do_not_specialize=[
        "T", "dx_0", "dx_b", "dx_t", "x_0", "x_b", "x_t", "t_0", "t_b", "t_t", "ignore_index", "blocks",
    ]
)  # fmt: skip
def backward_kernel(
    dx, logits, teacher, labels, grad, row_max, log_sum, teacher_max, teacher_log_sum,
    T, V, dx_0: tl.int64, dx_b: tl.int64, dx_t: tl.int64, x_0: tl.int64, x_b: tl.int64, x_t: tl.int64,
    t_0: tl.int64, t_b: tl.int64, t_t: tl.int64, ignore_index: tl.int64, blocks, penalty: tl.float64,
    factor: tl.float64, bound: tl.float64, inverse: tl.float64,
    CAP: tl.constexpr, PENALTY: tl.constexpr, PRECISE: tl.constexpr, ALIGNED: tl.constexpr, TOGETHER: tl.constexpr,
    STAGES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = LANES * VECTOR * UNROLL
    DTYPE: tl.constexpr = row_max.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    label, ignored = label_of(labels, row, V, ignore_index)
    out = start_of(row, T, dx_0, dx_b, dx_t)
    start, t_start = start_of(row, T, x_0, x_b, x_t), start_of(row, T, t_0, t_b, t_t)
    lead = before_line(dx, out, V, ALIGNED)
    offs = lanes(LANES, VECTOR, UNROLL)
    less = scalar(penalty, DTYPE)
    g, high, logarithm = tl.load(grad + row), tl.load(row_max + row), tl.load(log_sum + row)
    t_high, t_logarithm = tl.load(teacher_max + row), tl.load(teacher_log_sum + row)

    first = tl.program_id(1) * blocks
    last = tl.minimum(first + blocks, tl.cdiv(V, BLOCK))
    full = tl.minimum(last, (V - lead) // BLOCK)
    for block in range(first, tl.where(ignored, full, first)):
        zeros = tl.zeros([UNROLL, LANES, VECTOR], dx.dtype.element_ty)
        tl.store(at_vector(dx, out + lead, True) + block * BLOCK + offs, zeros)
    # In place, what is loaded ahead are later blocks of this program, which nobody has written yet.
    for block in tl.range(tl.where(ignored, full, first), full, num_stages=STAGES):
        place = block * BLOCK
        y = tl.load(at_vector(logits, start + lead, TOGETHER) + place + offs).to(DTYPE)
        t = tl.load(at_vector(teacher, t_start + lead, TOGETHER) + place + offs).to(DTYPE)
        y = capped(y, inverse, CAP)
        t = capped(t, inverse, CAP)
        if PENALTY:
            t = tl.where(offs == label - lead - place, t - less, t)
        d = gradient(y, t, g, high, logarithm, t_high, t_logarithm, factor, inverse, CAP, PRECISE)
        tl.store(at_vector(dx, out + lead, True) + place + offs, d.to(dx.dtype.element_ty))
    for block in range(tl.maximum(first, full), last):  # the end of the row, and its start before the first line
        place = block * BLOCK + offs
        column = columns(place, lead, V, ALIGNED)
        inside = place < V
        read = inside & (not ignored)
        y = tl.load(at_vector(logits, start, ALIGNED) + column, mask=read, other=0).to(DTYPE)
        t = tl.load(at_vector(teacher, t_start, ALIGNED) + column, mask=read, other=0).to(DTYPE)
        y = capped(y, inverse, CAP)
        t = capped(t, inverse, CAP)
        if PENALTY:
            t = tl.where(column == label, t - less, t)
        d = gradient(y, t, g, high, logarithm, t_high, t_logarithm, factor, inverse, CAP, PRECISE)
        d = tl.where(ignored, 0, d).to(dx.dtype.element_ty)
        tl.store(at_vector(dx, out, ALIGNED) + column, d, mask=inside)


# -- launchers ---------------------------------------------------------------------------------------------------------


def token_kl(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, ignore_index: int, softcap: float, temperature: float,
    label_penalty: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator; its arguments have been checked."""
    dtype = wide(logits.dtype)
    results = tuple(logits.new_empty(labels.shape, dtype=dtype) for _ in range(5))
    if labels.numel() == 0:
        return results
    with torch.cuda.device_of(logits):
        x, t = as_rows(logits, teacher_logits)
        labels, N, V = labels.contiguous(), labels.numel(), x.shape[2]
        way = walk(PACE._replace(vectors=1) if softcap else PACE, x, t)  # two softcaps take registers
        parts = logits.new_empty(5, N, way.parts, dtype=dtype) if way.parts > 1 else None
        settings = units(temperature, softcap)
        forward_kernel[(N, way.parts)](
            *results, parts, storage(x), storage(t), labels, x.shape[1], V, *strides(x), *strides(t), ignore_index,
            way.blocks, label_penalty / settings["factor"], **settings, PENALTY=label_penalty != 0,
            PRECISE=x.dtype == torch.float32, TOGETHER=way.together, **way.constants,
        )  # fmt: skip
        if parts is not None:
            merge_kernel[(N,)](
                *results, parts, labels, V, ignore_index, way.parts, settings["factor"], settings["bound"],
                PARTS=triton.next_power_of_2(way.parts), num_warps=1,
            )  # fmt: skip
    return results


def token_kl_backward(
    grad: Tensor, logits: Tensor, teacher_logits: Tensor, labels: Tensor, row_max: Tensor, log_sum: Tensor,
    teacher_max: Tensor, teacher_log_sum: Tensor, ignore_index: int, softcap: float, temperature: float,
    label_penalty: float,
) -> Tensor:  # fmt: skip
    """The operator; its arguments have been checked."""
    dx = logits.new_empty(logits.shape)
    saved = (grad, row_max, log_sum, teacher_max, teacher_log_sum)
    backward(dx, logits, teacher_logits, labels, saved, ignore_index, label_penalty, temperature, softcap)
    return dx


def token_kl_backward_(
    grad: Tensor, logits: Tensor, teacher_logits: Tensor, labels: Tensor, row_max: Tensor, log_sum: Tensor,
    teacher_max: Tensor, teacher_log_sum: Tensor, ignore_index: int, softcap: float, temperature: float,
    label_penalty: float,
) -> None:  # fmt: skip
    """The operator; its arguments have been checked."""
    saved = (grad, row_max, log_sum, teacher_max, teacher_log_sum)
    backward(logits, logits, teacher_logits, labels, saved, ignore_index, label_penalty, temperature, softcap)


def backward(
    out: Tensor, logits: Tensor, teacher_logits: Tensor, labels: Tensor, scalars: tuple[Tensor, ...],
    ignore_index: int, label_penalty: float, temperature: float, softcap: float,
) -> None:  # fmt: skip
    """out may be the logits. scalars: the cotangent, and what the forward kept of each row."""
    if logits.numel() == 0:
        return
    with torch.cuda.device_of(logits):
        dx, x, t = as_rows(out, logits, teacher_logits)
        way, settings = walk(PACE, dx, x, t), units(temperature, softcap)
        backward_kernel[(labels.numel(), way.parts)](
            storage(dx), storage(x), storage(t), labels.contiguous(),
            *(s.to(scalars[1].dtype).contiguous() for s in scalars), x.shape[1], x.shape[2],
            *strides(dx), *strides(x), *strides(t), ignore_index, way.blocks,
            label_penalty / settings["factor"], **settings, PENALTY=label_penalty != 0,
            PRECISE=x.dtype == torch.float32, TOGETHER=way.together, **way.constants,
        )  # fmt: skip
        if dx.data_ptr() != out.data_ptr():  # a layout that had to be copied
            out.copy_(dx.view(out.shape))


def shipped(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kind of rows, with nothing and with everything on top (see unlearn_fast.ops.resources)."""
    for (title, x, forward, backward), everything in itertools.product(shipped_rows(dtype), (False, True)):
        labels, row = torch.empty(x.shape[:-1], dtype=torch.long), x.new_empty(x.shape[:-1], dtype=wide(dtype))
        title += ", penalty and softcap" if everything else ""
        settings: Any = (-100, 30.0 if everything else 0.0, 1.0, 1.0 if everything else 0.0)
        if forward:
            yield title, functools.partial(token_kl, x, x, labels, *settings)
        if backward:
            yield title, functools.partial(token_kl_backward, row, x, x, labels, row, row, row, row, *settings)
