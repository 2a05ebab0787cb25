"""Cross entropy from hidden states and the lm_head: what every training step needs beside the unlearning loss."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from unlearn_fast._library import warn_if_slow
from unlearn_fast.losses.linear import Head, MeanOfSequences, mean_of_sequences
from unlearn_fast.losses.rows import LabelRows, Rows, SmoothedRows
from unlearn_fast.ops import _checks, _chunks
from unlearn_fast.ops.linear_token_logprobs import linear_token_logprobs


def linear_cross_entropy(
    input: Tensor,  # [..., H]
    linear_weight: Tensor,  # [V, H]
    target: Tensor,  # [...]
    *,
    linear_bias: Tensor | None = None,  # [V]
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,
    weight_grad_dtype: torch.dtype | None = None,
) -> Tensor:  # [], or [...] for reduction="none"
    """Cross entropy of the logits input @ linear_weight.T + linear_bias with the targets; the logits are never stored.

    The contract of `torch.nn.functional.linear_cross_entropy` for class indices, without class weights, with these
    differences: any leading shape; int32 targets; nothing is shifted, as there; the result is float32 (float64 for
    float64 input); a mean over no target at all is 0, not NaN.

    "mean" and "sum" compute the gradients in the forward: 6 N H V floating-point operations for N targets, one backward
    only; see `linear_gradient_ascent_loss`. "none", whose gradient is not known before the backward, computes the
    logits twice: 8 N H V.

    Args:
        ignore_index: targets that do not count, nor have a gradient.
        label_smoothing: e in [0, 1]; the target distribution is (1 - e) onehot + e / V.
        chunk_bytes: upper limit of the logits that exist at a time (at least one row); None: what suits the device.
        weight_grad_dtype: see `LinearOptions`.
    """
    _checks.floating("input", input)
    _checks.labels_of_rows("target", target, "input", input)
    _checks.lm_head("linear_", input, linear_weight, linear_bias, hidden_name="input")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of mean, sum, none; got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be in [0, 1]")
    _checks.accumulation(chunk_bytes, weight_grad_dtype, linear_weight)
    warn_if_slow(input.device.type)
    if reduction == "none":
        return _of_each(input, linear_weight, target, linear_bias, ignore_index, label_smoothing, chunk_bytes)
    rows: Rows = LabelRows(ignore_index, 0.0, 1.0)
    if label_smoothing:
        rows = SmoothedRows(ignore_index, label_smoothing)
    sign = 1 if label_smoothing else -1  # those rows hold the cross entropy, the others log p
    call = MeanOfSequences(
        values=lambda numbers, _: sign * numbers.squeeze(1),
        rows=rows,
        targets=[target.reshape(-1, 1)],  # each row a sequence
        constants=(),
        divisor=(target != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
        weight_grad_dtype=weight_grad_dtype,
    )
    hidden = input.reshape(-1, 1, input.shape[-1])
    return mean_of_sequences(call, Head([hidden], linear_weight, linear_bias))


def _of_each(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_bytes: int | None,
) -> Tensor:
    if not label_smoothing:
        return -linear_token_logprobs(
            input, weight, target, bias=bias, ignore_index=ignore_index, chunk_bytes=chunk_bytes
        )

    def of_chunk(x: Tensor, y: Tensor) -> Tensor:
        logits = linear(x.masked_fill((y < 0).unsqueeze(1), 0), weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, y, reduction="none", ignore_index=-1, label_smoothing=label_smoothing)

    y = target.reshape(-1).long()
    size = _chunks.rows_a_chunk(chunk_bytes, len(weight) * 4, len(y), weight.device)
    y = y.masked_fill(y == ignore_index, -1)
    chunks = zip(input.reshape(-1, input.shape[-1]).split(size), y.split(size), strict=True)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]).view(target.shape)
