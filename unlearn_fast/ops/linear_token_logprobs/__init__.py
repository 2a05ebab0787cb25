"""Token log-probabilities from hidden states and the lm_head: the [N, V] logits never exist."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unlearn_fast._library import differentiate, fake, implement, not_twice_differentiable, warn_if_slow
from unlearn_fast.ops import _checks, _chunks, _rows


def linear_token_logprobs(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    shift: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor:  # [...]
    """Log-probability of each label under `softmax(hidden @ weight.T + bias)`, softcapped and scaled on request.

    Works in chunks of rows: the logits of one chunk exist at a time, at most `chunk_bytes` of them (at least one row).
    The backward computes each chunk's logits again and turns them into their gradient in place: 8 N H V floating-point
    operations for N rows, for any cotangent. The weight's gradient is accumulated in float32. On the CPU, ignored rows
    cost nothing: they are left out of the matrix products.

    Args:
        hidden: [..., H]; weight: [V, H]; bias: [V]; all in one dtype: float32, float64, bfloat16 or float16. All is
            computed in that dtype's precision, under autocast too.
        labels: [...] in int64 or int32, each in [0, V) or `ignore_index`.
        ignore_index: rows with this label give 0 and an exactly zero gradient.
        softcap, temperature, shift: as in `token_logprobs`.
        chunk_bytes: upper limit, in bytes, of the logits that exist at a time; None: what suits the device.

    Returns:
        Natural logarithms shaped like `labels`, in float32 (float64 for float64 hidden states). Differentiable once in
        hidden, weight and bias, with any cotangent.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit.
        RuntimeError: a label is outside [0, V) (on the CPU).
    """
    _checks.floating("hidden", hidden)
    _checks.labels_of_rows("labels", labels, "hidden", hidden)
    _checks.lm_head("", hidden, weight, bias)
    _checks.accumulation(chunk_bytes, None, weight)
    options = ignore_index, _rows.check_scaling(softcap, temperature), float(temperature), chunk_bytes or 0
    warn_if_slow(hidden.device.type)
    if shift:
        labels = _rows.next_labels(labels, ignore_index)
    return torch.ops.unlearn_fast.linear_token_logprobs(hidden, weight, labels, bias, *options)[0]


# -- the operator: torch's matrix product on chunks, the row kernel between --------------------------------------------


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The products run in the dtype of the inputs: autocast would give forward and backward different logits."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return run


@_without_autocast
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float,
    temperature: float,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    options = ignore_index, softcap, temperature, False
    rows, flat_labels = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.reshape(-1)
    results = tuple(hidden.new_zeros(flat_labels.shape, dtype=_rows.wide_dtype(hidden)) for _ in range(3))
    chunks, buffer = _plan(weight, bias, flat_labels, ignore_index, chunk_bytes)
    for chunk in chunks:
        logits = buffer.of(rows[chunk])
        values = torch.ops.unlearn_fast.token_logprobs(logits, flat_labels[chunk], *options)[:3]
        for result, value in zip(results, values, strict=True):
            result[chunk] = value
    return tuple(result.view(labels.shape) for result in results)  # type: ignore[return-value]


@_without_autocast
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
    chunk_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that is not needed."""
    need_hidden, need_weight, need_bias = needs
    options = ignore_index, softcap, temperature
    rows, flat_labels = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.reshape(-1)
    saved = [t.reshape(-1) for t in (grad, logp, row_max, log_sum)]
    nothing = saved[0].new_empty(0)  # the rows' entropy, which no cotangent asks for
    d_rows = torch.zeros_like(rows, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    d_head = _chunks.HeadGradient(weight, logp.dtype, need_weight=need_weight, need_bias=need_bias)
    chunks, buffer = _plan(weight, bias, flat_labels, ignore_index, chunk_bytes)
    for chunk in chunks:
        inputs, chunk_labels = rows[chunk], flat_labels[chunk]
        d_logits = buffer.of(inputs)  # the logits, until the next lines overwrite them
        chunk_grad, *stats = (t[chunk] for t in saved)
        torch.ops.unlearn_fast.token_logprobs_backward_(
            chunk_grad, None, None, None, d_logits, chunk_labels, *stats, nothing, *options
        )
        if need_hidden:
            d_rows[chunk] = d_logits @ weight
        if need_weight or need_bias:
            d_head.add(d_logits, _chunks.without_ignored(inputs, chunk_labels, ignore_index))
    d_weight, d_bias = d_head.finish()
    return d_rows.view(hidden.shape) if need_hidden else d_rows, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def _plan(
    weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk_bytes: int
) -> tuple[Sequence[Any], _chunks.Logits]:
    """Selections of rows, without ignored ones where asking for them costs no sync; and what makes their logits."""
    kept = (labels != ignore_index).nonzero().squeeze(-1) if _chunks.only_labelled_rows(labels) else None
    N = len(labels) if kept is None else len(kept)
    size = _chunks.rows_a_chunk(chunk_bytes or None, len(weight) * weight.element_size(), N, weight.device)
    pieces = _chunks.pieces(N, size)
    buffer = _chunks.Logits(weight, bias, min(N, size))
    return pieces if kept is None or len(labels) == N else [kept[piece] for piece in pieces], buffer


implement("linear_token_logprobs", _forward)
implement("linear_token_logprobs_backward", _backward)


# -- shapes and derivatives --------------------------------------------------------------------------------------------


def _forward_fake(hidden: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(hidden.new_empty(labels.shape, dtype=_rows.wide_dtype(hidden)) for _ in range(3))  # type: ignore[return-value]


def _backward_fake(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, labels, bias, *output)


def _derivative(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    gradients = torch.ops.unlearn_fast.linear_token_logprobs_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, None, None, None, None


fake("linear_token_logprobs", _forward_fake)
fake("linear_token_logprobs_backward", _backward_fake)
differentiate("linear_token_logprobs", _derivative, _setup_context)
not_twice_differentiable("linear_token_logprobs_backward")
