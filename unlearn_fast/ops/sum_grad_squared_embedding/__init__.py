"""Sums of squared per-example gradients of an embedding table, touching only the rows that occur."""

import torch
from torch import Tensor

from unlearn_fast import reference
from unlearn_fast._library import fake, implement, warn_if_slow
from unlearn_fast.ops import _checks


def sum_grad_squared_embedding_(
    out: Tensor,  # [V, H]
    tokens: Tensor,  # [B, T]
    grad_outputs: Tensor,  # [B, T, H]
    *,
    scale: float = 1.0,
    weights: Tensor | None = None,  # [B]
    first: Tensor | None = None,  # [V, H]
    absolute: bool = False,
) -> Tensor:
    """`out[v] += scale * sum_b weights[b] * G_b[v]^2`, with `G_b[v] = sum_{t: tokens[b, t] = v} grad_outputs[b, t]`.

    In place. G_b is example b's gradient of the table of `y = table[tokens]`: tokens that an example repeats are summed
    before they are squared. Rows whose token does not occur are neither read nor written; neither [B, V, H] nor [V, H]
    is stored.

    Args:
        out: [V, H] in float32 (float64 for float64 gradients), added to.
        tokens: [B, T], int64 or int32, below V. Negative tokens are skipped, which is how a padding index is expressed.
        grad_outputs: the loss gradient of the embedded tokens, [B, T, H] in float32, float64, bfloat16 or float16; any
            strides. 16-bit gradients are accumulated in float32.
        scale: factor of this contribution, for example 1 / number of examples.
        weights: a factor of each example, [B] in out's dtype; None for ones.
        first: like `out`; `first[v] += scale * sum_b weights[b] * G_b[v]` is added to it in the same pass.
        absolute: |G_b| in place of G_b^2.

    Returns:
        `out`. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or `out` or `first` has overlapping (expanded)
            memory.
        RuntimeError: a token is V or above. After any error `out` and `first` are unchanged.
    """
    _check(out, tokens, grad_outputs)
    _checks.moments(out, first, weights, tokens.shape[0])
    warn_if_slow(out.device.type, "sum_grad_squared_embedding_")
    tensors = _checks.without_graph(out, tokens, grad_outputs, weights, first)
    torch.ops.unlearn_fast.sum_grad_squared_embedding_.default(*tensors, scale, absolute)
    _checks.written(out, first)
    return out


def _check(out: Tensor, tokens: Tensor, grad_outputs: Tensor) -> None:
    _checks.floating("grad_outputs", grad_outputs)
    wide = torch.float64 if grad_outputs.dtype == torch.float64 else torch.float32
    if out.dtype != wide:
        raise TypeError(f"out has dtype {out.dtype}: it must be {wide} for grad_outputs in {grad_outputs.dtype}")
    _checks.labels_of_rows("tokens", tokens, "grad_outputs", grad_outputs)
    if tokens.dim() != 2:
        raise ValueError(f"tokens has shape {_checks.shape(tokens)}: it must be [B, T]")
    if out.dim() != 2 or out.shape[1] != grad_outputs.shape[-1]:
        raise ValueError(f"out has shape {_checks.shape(out)}: it must be [V, H] with H = {grad_outputs.shape[-1]}")
    if grad_outputs.device != out.device:
        raise ValueError(
            f"out is on {out.device} and grad_outputs on {grad_outputs.device}: they must be on one device"
        )


def _add_squares(
    out: Tensor,
    tokens: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None,
    first: Tensor | None,
    scale: float,
    absolute: bool,
) -> None:
    if tokens.numel() and (largest := int(tokens.max())) >= len(out):
        raise RuntimeError(f"tokens holds {largest}: a token must be below V = {len(out)}; negative ones are skipped")
    reference.sum_grad_squared_embedding_(
        out, tokens, grad_outputs, scale=scale, weights=weights, first=first, absolute=absolute
    )


implement("sum_grad_squared_embedding_", _add_squares)
fake("sum_grad_squared_embedding_", lambda *_: None)
