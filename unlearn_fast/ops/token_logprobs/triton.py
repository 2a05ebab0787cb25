"""Token log-probabilities and their gradient on GPUs.

Forward, fused: softcap, temperature, running maximum and sum of exponentials and, on request, entropy, mean and whether
the label has the largest logit. Reads the logits once, a block at a time (unlearn_fast.ops._triton_rows tells how), the
label's again at the end, and writes a few scalars a row. The label's own term is kept out of the sum, so that
log p = -log1p(sum of the others / own) keeps its relative precision as p -> 1.
Backward, fused: softmax from the saved maximum and log-sum, all cotangents, temperature and softcap. Reads the logits
once and writes the gradient once; that may be the logits' own memory.
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
    expm1,
    exponential,
    label_of,
    lanes,
    larger,
    log1p,
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

PACE = Pace(vectors=2, warps=4, stages=5)


@triton.jit
def with_block(high, total, moment, sum_y, y, others, factor, bound, PRECISE: tl.constexpr, STATISTICS: tl.constexpr):
    """The lanes' sums with a block: of e = exp(factor * (y - high)) and e (y - high) over `others`, which are y or,
    where a column does not count, -inf; and of y itself.
    """
    new = larger(high, block_max(others))
    sunk, weight = weights(high, new, factor, bound, PRECISE, True)
    below, e = weights(others, new[None, :, None], factor, bound, PRECISE, PRECISE or STATISTICS)
    if STATISTICS:
        moment = weight * (moment + sunk * total) + block_sum(e * below)
        sum_y += block_sum(y)
    return new, weight * total + block_sum(e), moment, sum_y


@triton.jit
def store_row(
    logp, row_max, log_sum, entropy, mean_logit, hit,
    row, label, ignored, logits, start, V, high, total, moment, sum_y, factor, bound, inverse, CAP: tl.constexpr,
):  # fmt: skip
    """One row's results, from the sums over all columns but the label's."""
    DTYPE: tl.constexpr = high.dtype
    own = tl.load(logits + start + label, mask=label >= 0, other=float("nan")).to(DTYPE)
    own = capped(own, inverse, CAP)
    high = tl.where(total == 0, float("-inf"), high)
    top = larger(high, own)

    # The others' share over the label's. What the difference loses to rounding is added to first order.
    far = high - own
    back = far - high
    lost = (high - (far - back)) - (own + back)
    ratio = total * exponential(larger(far, scalar(bound, DTYPE)), factor, True) * (1 + lost * scalar(factor, DTYPE))
    ratio = tl.where(total == 0, total, ratio)
    log_ratio = far * scalar(factor, DTYPE) + tl.log(total)
    small = -log_ratio - log1p(exponential(larger(-log_ratio, VANISHING), 1.0, True))
    value = tl.where(log_ratio > 0, small, -log1p(ratio))
    value = tl.where(top - top == 0, value, float("nan"))  # as log_softmax has it where the largest is infinite

    high_below, high_weight = weights(high, top, factor, bound, True, True)
    own_below, own_weight = weights(own, top, factor, bound, True, True)
    everything = high_weight * total + own_weight
    logarithm = tl.where(own == top, -value, tl.log(everything))
    tl.store(logp + row, tl.where(ignored, 0, value))
    tl.store(row_max + row, tl.where(ignored, 0, top * scalar(factor, DTYPE)))
    tl.store(log_sum + row, tl.where(ignored, 0, logarithm))
    if entropy is not None:
        moment = high_weight * (moment + high_below * total) + own_weight * own_below
        tl.store(entropy + row, tl.where(ignored, 0, logarithm - moment / everything * scalar(factor, DTYPE)))
        mean = tl.where(label >= 0, sum_y * scalar(factor, DTYPE) / V, float("nan"))
        tl.store(mean_logit + row, tl.where(ignored, 0, mean))
        tl.store(hit + row, tl.where(ignored, 0, (own == top).to(DTYPE)))


@triton.jit
def merged(high, total, moment, sum_y, factor, bound):
    """Lanes' sums as one."""
    top = tl.reduce(high, 0, larger)
    below, weight = weights(high, top, factor, bound, True, True)
    return top, tl.sum(weight * total, 0), tl.sum(weight * (moment + below * total), 0), tl.sum(sum_y, 0)


@triton.jit(do_not_specialize=["T", "x_0", "x_b", "x_t", "ignore_index", "blocks"])
def forward_kernel(
    logp, row_max, log_sum, entropy, mean_logit, hit, parts,  # parts: [4, N, programs of a row], or None for one
    logits, labels, T, V, x_0: tl.int64, x_b: tl.int64, x_t: tl.int64, ignore_index: tl.int64, blocks,
    factor: tl.float64, bound: tl.float64, inverse: tl.float64,
    CAP: tl.constexpr, PRECISE: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = LANES * VECTOR * UNROLL
    STATISTICS: tl.constexpr = entropy is not None
    DTYPE: tl.constexpr = logp.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    label, ignored = label_of(labels, row, V, ignore_index)
    start = start_of(row, T, x_0, x_b, x_t)
    lead = before_line(logits, start, V, ALIGNED)
    offs = lanes(LANES, VECTOR, UNROLL)
    high = lowest(LANES, DTYPE)
    total = tl.zeros([LANES], DTYPE)
    moment, sum_y = total, total

    first = tl.program_id(1) * blocks
    last = tl.where(ignored, first, tl.minimum(first + blocks, tl.cdiv(V, BLOCK)))
    full = tl.maximum(first, tl.minimum(last, (V - lead) // BLOCK))
    # Full blocks but the label's, which comes later: so that none of them asks each element whether it is the label.
    own = label - lead
    own_block = tl.where((own >= first * BLOCK) & (own < full * BLOCK), own // BLOCK, full)
    plain = tl.where(own_block < full, full - 1, full)
    for step in tl.range(first, plain, num_stages=STAGES):
        place = tl.where(step < own_block, step, step + 1) * BLOCK
        y = tl.load(at_vector(logits, start + lead, True) + place + offs).to(DTYPE)
        y = capped(y, inverse, CAP)
        high, total, moment, sum_y = with_block(high, total, moment, sum_y, y, y, factor, bound, PRECISE, STATISTICS)
    # The label's, and the end of the row with its start before the first line.
    for step in range(plain, last):
        place = tl.where(step < full, own_block, step) * BLOCK + offs
        column = columns(place, lead, V, ALIGNED)
        y = tl.load(at_vector(logits, start, ALIGNED) + column, mask=place < V, other=0).to(DTYPE)
        y = capped(y, inverse, CAP)
        others = tl.where((column == label) | (place >= V), float("-inf"), y)
        high, total, moment, sum_y = with_block(
            high, total, moment, sum_y, y, others, factor, bound, PRECISE, STATISTICS
        )

    high, total, moment, sum_y = merged(high, total, moment, sum_y, factor, bound)
    if parts is None:
        store_row(
            logp, row_max, log_sum, entropy, mean_logit, hit, row, label, ignored, logits, start, V, high, total,
            moment, sum_y, factor, bound, inverse, CAP,
        )  # fmt: skip
    else:
        count = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        place = parts + row * tl.num_programs(1) + tl.program_id(1)
        tl.store(place, high)
        tl.store(place + count, total)
        if STATISTICS:
            tl.store(place + 2 * count, moment)
            tl.store(place + 3 * count, sum_y)


@triton.jit(do_not_specialize=["T", "x_0", "x_b", "x_t", "ignore_index", "P"])
def merge_kernel(
    logp, row_max, log_sum, entropy, mean_logit, hit, parts,
    logits, labels, T, V, x_0: tl.int64, x_b: tl.int64, x_t: tl.int64, ignore_index: tl.int64, P,
    factor: tl.float64, bound: tl.float64, inverse: tl.float64,
    CAP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program a row: its P parts as lanes, merged."""
    DTYPE: tl.constexpr = logp.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    label, ignored = label_of(labels, row, V, ignore_index)
    offs, count = tl.arange(0, PARTS), tl.num_programs(0).to(tl.int64) * P
    place, mask = parts + row * P + offs, offs < P
    high = tl.where(mask, tl.load(place, mask=mask, other=0), lowest(PARTS, DTYPE))
    total = tl.load(place + count, mask=mask, other=0)
    moment, sum_y = total, total
    if entropy is not None:
        moment = tl.load(place + 2 * count, mask=mask, other=0)
        sum_y = tl.load(place + 3 * count, mask=mask, other=0)
    high, total, moment, sum_y = merged(high, total, moment, sum_y, factor, bound)
    store_row(
        logp, row_max, log_sum, entropy, mean_logit, hit, row, label, ignored, logits,
        start_of(row, T, x_0, x_b, x_t), V, high, total, moment, sum_y, factor, bound, inverse, CAP,
    )  # fmt: skip


@triton.jit
def gradient(
    y, own, grad, grad_own, grad_lse, grad_entropy, grad_mean, row_max, log_sum, entropy, factor, inverse,
    CAP: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """A block's gradient; own: where the label is."""
    log_p = larger((y * scalar(factor, y.dtype) - row_max) - log_sum, VANISHING)
    p = exponential(log_p, 1.0, PRECISE)
    common = tl.zeros_like(p)
    if grad_lse is not None:
        common += grad_lse
    if grad_entropy is not None:
        common -= grad_entropy * (log_p + entropy)
    dz = p * (common - grad)
    dz = tl.where(own, p * common + grad_own, dz)
    if grad_mean is not None:
        dz += grad_mean
    return uncapped(dz, y, factor, inverse, CAP)


@triton.jit(do_not_specialize=["T", "dx_0", "dx_b", "dx_t", "x_0", "x_b", "x_t", "ignore_index", "blocks"])
def backward_kernel(
    dx, logits, labels, grad_logp, grad_lse, grad_entropy, grad_mean, logp, row_max, log_sum, entropy,
    T, V, dx_0: tl.int64, dx_b: tl.int64, dx_t: tl.int64, x_0: tl.int64, x_b: tl.int64, x_t: tl.int64,
    ignore_index: tl.int64, blocks, factor: tl.float64, bound: tl.float64, inverse: tl.float64,
    CAP: tl.constexpr, PRECISE: tl.constexpr, ALIGNED: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = LANES * VECTOR * UNROLL
    DTYPE: tl.constexpr = logp.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    label, ignored = label_of(labels, row, V, ignore_index)
    start, out = start_of(row, T, x_0, x_b, x_t), start_of(row, T, dx_0, dx_b, dx_t)
    lead = before_line(dx, out, V, ALIGNED)
    offs = lanes(LANES, VECTOR, UNROLL)

    g = tl.load(grad_logp + row)
    g_own = -g * expm1(tl.load(logp + row))
    g_lse = tl.load(grad_lse + row) if grad_lse is not None else None
    g_entropy = tl.load(grad_entropy + row) if grad_entropy is not None else None
    row_entropy = tl.load(entropy + row) if grad_entropy is not None else None
    g_mean = tl.load(grad_mean + row) / V if grad_mean is not None else None
    high, logarithm = tl.load(row_max + row), tl.load(log_sum + row)

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
        y = capped(y, inverse, CAP)
        d = gradient(
            y, offs == label - lead - place, g, g_own, g_lse, g_entropy, g_mean, high, logarithm, row_entropy,
            factor, inverse, CAP, PRECISE,
        )  # fmt: skip
        tl.store(at_vector(dx, out + lead, True) + place + offs, d.to(dx.dtype.element_ty))
    for block in range(tl.maximum(first, full), last):  # the end of the row, and its start before the first line
        place = block * BLOCK + offs
        column = columns(place, lead, V, ALIGNED)
        inside = place < V
        y = tl.load(at_vector(logits, start, ALIGNED) + column, mask=inside & (not ignored), other=0).to(DTYPE)
        y = capped(y, inverse, CAP)
        d = gradient(
            y, column == label, g, g_own, g_lse, g_entropy, g_mean, high, logarithm, row_entropy, factor, inverse,
            CAP, PRECISE,
        )  # fmt: skip
        d = tl.where(ignored, 0, d).to(dx.dtype.element_ty)
        tl.store(at_vector(dx, out, ALIGNED) + column, d, mask=inside)


# -- launchers ---------------------------------------------------------------------------------------------------------


def token_logprobs(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float, temperature: float, statistics: bool
) -> tuple[Tensor, ...]:
    """The operator; its arguments have been checked."""
    dtype = wide(logits.dtype)
    results = [logits.new_empty(labels.shape if n < 3 or statistics else 0, dtype=dtype) for n in range(6)]
    if labels.numel() == 0:
        return tuple(results)
    with torch.cuda.device_of(logits):
        (x,) = as_rows(logits)
        labels, N, V = labels.contiguous(), labels.numel(), x.shape[2]
        way = walk(PACE, x)
        parts = logits.new_empty(4 if statistics else 2, N, way.parts, dtype=dtype) if way.parts > 1 else None
        places = [*results[:3], *(results[3:] if statistics else (None,) * 3), parts]
        settings = units(temperature, softcap)
        forward_kernel[(N, way.parts)](
            *places, storage(x), labels, x.shape[1], V, *strides(x), ignore_index, way.blocks, **settings,
            PRECISE=x.dtype == torch.float32, **way.constants,
        )  # fmt: skip
        if parts is not None:
            merge_kernel[(N,)](
                *places, storage(x), labels, x.shape[1], V, *strides(x), ignore_index, way.parts, **settings,
                PARTS=triton.next_power_of_2(way.parts), num_warps=1,
            )  # fmt: skip
    return tuple(results)


def token_logprobs_backward(
    grad_logp: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, grad_mean: Tensor | None,
    logits: Tensor, labels: Tensor, logp: Tensor, row_max: Tensor, log_sum: Tensor, entropy: Tensor,
    ignore_index: int, softcap: float, temperature: float,
) -> Tensor:  # fmt: skip
    """The operator; its arguments have been checked."""
    dx = logits.new_empty(logits.shape)
    backward(
        dx, logits, labels, (grad_logp, grad_lse, grad_entropy, grad_mean), (logp, row_max, log_sum, entropy),
        ignore_index, units(temperature, softcap),
    )  # fmt: skip
    return dx


def token_logprobs_backward_(
    grad_logp: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, grad_mean: Tensor | None,
    logits: Tensor, labels: Tensor, logp: Tensor, row_max: Tensor, log_sum: Tensor, entropy: Tensor,
    ignore_index: int, softcap: float, temperature: float,
) -> None:  # fmt: skip
    """The operator; its arguments have been checked."""
    backward(
        logits, logits, labels, (grad_logp, grad_lse, grad_entropy, grad_mean), (logp, row_max, log_sum, entropy),
        ignore_index, units(temperature, softcap),
    )  # fmt: skip


def backward(
    out: Tensor, logits: Tensor, labels: Tensor, grads: tuple[Tensor | None, ...], saved: tuple[Tensor, ...],
    ignore_index: int, settings: dict[str, Any],
) -> None:  # fmt: skip
    """out may be the logits."""
    if logits.numel() == 0:
        return
    with torch.cuda.device_of(logits):
        dx, x = as_rows(out, logits)
        way = walk(PACE, dx, x)
        scalars = [None if g is None else g.to(saved[0].dtype).contiguous() for g in (*grads, *saved)]
        if grads[2] is None:
            scalars[-1] = None
        backward_kernel[(labels.numel(), way.parts)](
            storage(dx), storage(x), labels.contiguous(), *scalars, x.shape[1], x.shape[2], *strides(dx), *strides(x),
            ignore_index, way.blocks, **settings, PRECISE=x.dtype == torch.float32, TOGETHER=way.together,
            **way.constants,
        )  # fmt: skip
        if dx.data_ptr() != out.data_ptr():  # a layout that had to be copied
            out.copy_(dx.view(out.shape))


def shipped(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kind of rows, with nothing and with everything on top (see unlearn_fast.ops.resources)."""
    for (title, x, forward, backward), everything in itertools.product(shipped_rows(dtype), (False, True)):
        labels, row = torch.empty(x.shape[:-1], dtype=torch.long), x.new_empty(x.shape[:-1], dtype=wide(dtype))
        title += ", statistics and softcap" if everything else ""
        settings = (-100, 30.0 if everything else 0.0, 1.0)
        arguments: Any = (x, labels, *settings, everything)
        if forward:
            yield title, functools.partial(token_logprobs, *arguments)
        arguments = (row, *((row if everything else None),) * 3, x, labels, row, row, row, row, *settings)
        if backward:
            yield title, functools.partial(token_logprobs_backward, *arguments)
