"""KL divergence of each token's distribution from a teacher's: the retain terms, and UNDIAL's target."""

from typing import Any

import torch
from torch import Tensor

from unlearn_fast._library import differentiate, fake, implement, not_twice_differentiable, warn_if_slow
from unlearn_fast.ops import _checks, _rows

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
EVERY_ROW = -1  # the ignore_index of calls without labels


def token_kl(
    logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    labels: Tensor | None = None,  # [...]
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_penalty: float = 0.0,
    shift: bool = False,
    inplace_backward: bool = False,
) -> Tensor:  # [...]
    """KL(q || p) = sum_j q_j (log q_j - log p_j) of each row, q the teacher's softmax and p that of the logits.

    p = softmax(z) and q = softmax(w - label_penalty * onehot(label)), with z and w the logits of either under the same
    softcap and temperature, as in `token_logprobs`. A penalty gives the target of UNDIAL (Dong et al., "UNDIAL:
    Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models", NAACL 2025).

    No softmax is stored: the forward reads both tensors once, the backward reads both and writes the gradient once.

    Args:
        logits: [..., V] in float32, float64, bfloat16 or float16; any strides on the leading axes.
        teacher_logits: the same shape, in a dtype of their own; they get no gradient.
        labels: [...] in int64 or int32, each in [0, V) or `ignore_index`; None scores every row. Without a penalty any
            label in range means only that the row counts.
        ignore_index: rows with this label give 0 and an exactly zero gradient, whatever either logits hold.
        softcap: the cap of both logits, above 0, or None.
        temperature: above 0, of both; the divergence is not multiplied by its square.
        label_penalty: what is taken from the teacher's (scaled) logit of the label.
        shift: as in `token_logprobs`: position t has the label t + 1, and the last position is ignored.
        inplace_backward: as in `token_logprobs`.

    Returns:
        Natural units, shaped like `labels`, in float32 (float64 for float64 logits). Terms with q_j = 0 add 0; where
        p_j = 0 < q_j the divergence is inf. Differentiable once in logits, with any cotangent.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit; a penalty without labels; what
            `inplace_backward` refuses in `token_logprobs`, or a teacher that shares memory with the logits.
        RuntimeError: a label is outside [0, V) (on the CPU); logits overwritten before their backward.
    """
    _checks.floating("logits", logits)
    _checks.floating("teacher_logits", teacher_logits)
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits has shape {_checks.shape(teacher_logits)}:"
            f" it must be {_checks.shape(logits)}, as logits is"
        )
    if logits.device != teacher_logits.device:
        raise ValueError(
            f"teacher_logits is on {teacher_logits.device} and logits on {logits.device}: they must be on one device"
        )
    if labels is None:
        if label_penalty != 0:
            raise ValueError(f"labels is None and label_penalty {label_penalty}: a penalty needs labels")
        labels, ignore_index = logits.new_zeros(logits.shape[:-1], dtype=torch.int64), EVERY_ROW
    _checks.labels_of_rows("labels", labels, "logits", logits)
    if not abs(label_penalty) < torch.inf:
        raise ValueError(f"label_penalty is {label_penalty}: it must be finite")
    cap = _rows.check_scaling(softcap, temperature)
    warn_if_slow(logits.device.type)
    if shift:
        labels = _rows.next_labels(labels, ignore_index)
    teacher_logits = teacher_logits.detach()
    arguments = logits, teacher_logits, labels, ignore_index, cap, float(temperature), float(label_penalty)
    if inplace_backward and _rows.may_overwrite(logits):
        _rows.refuse_needed_logits(logits)
        if _checks.ranges_overlap(logits, teacher_logits):
            raise ValueError("inplace_backward would overwrite teacher_logits, which share memory with logits")
        return _OverwritingLogits.apply(*arguments)
    return torch.ops.unlearn_fast.token_kl(*arguments)[0]


class _OverwritingLogits(torch.autograd.Function):
    """token_kl whose backward puts the gradient where the logits were."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output = torch.ops.unlearn_fast.token_kl(*arguments)
        _save(ctx, arguments, output)
        ctx.overwritten = False
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _rows.overwrite_once(ctx)
        logits, *saved = ctx.saved_tensors
        target = logits.detach()
        torch.ops.unlearn_fast.token_kl_backward_(grad, target, *saved, *ctx.options)
        torch.autograd.graph.increment_version(target)
        return target, *[None] * 6


# -- the operators where no kernel serves ------------------------------------------------------------------------------


def _both(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
    label_penalty: float,
) -> tuple[Tensor, Tensor]:
    """z of the logits and of the teacher's, less the penalty."""
    dtype = _rows.wide_dtype(logits)
    z, w = (_rows.scaled(x.to(dtype), softcap, temperature) for x in (logits, teacher_logits))
    if label_penalty:
        label = labels.masked_fill(labels == ignore_index, 0).long().unsqueeze(-1)
        w = w.scatter_add(-1, label, torch.full_like(label, -label_penalty, dtype=dtype))
    return z, w


def _forward(logits: Tensor, teacher_logits: Tensor, labels: Tensor, ignore_index: int, *options: float) -> Rows:
    below, log_sums, maxima = [], [], []
    for z in _both(logits, teacher_logits, labels, ignore_index, *options):
        maxima.append(z.amax(-1))
        below.append(z - maxima[-1].unsqueeze(-1))
        log_sums.append(below[-1].logsumexp(-1))
    q = (below[1] - log_sums[1].unsqueeze(-1)).exp()
    cross = (q * (below[1] - below[0])).masked_fill(q == 0, 0).sum(-1)
    rows = cross + (log_sums[0] - log_sums[1]), maxima[0], log_sums[0], maxima[1], log_sums[1]
    return tuple(row.masked_fill(labels == ignore_index, 0) for row in rows)  # type: ignore[return-value]


def _backward(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    teacher_max: Tensor,
    teacher_log_sum: Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
    label_penalty: float,
) -> Tensor:
    z, w = _both(logits, teacher_logits, labels, ignore_index, softcap, temperature, label_penalty)
    p = (z - row_max.unsqueeze(-1) - log_sum.unsqueeze(-1)).exp()
    q = (w - teacher_max.unsqueeze(-1) - teacher_log_sum.unsqueeze(-1)).exp()
    gradient = grad.unsqueeze(-1) * (p - q) * _rows.slope(logits.to(z.dtype), softcap, temperature)
    return gradient.masked_fill((labels == ignore_index).unsqueeze(-1), 0).to(logits.dtype)


def _backward_(grad: Tensor, logits: Tensor, *saved: Any) -> None:
    logits.copy_(_backward(grad, logits, *saved))


implement("token_kl", _forward)
implement("token_kl_backward", _backward)
implement("token_kl_backward_", _backward_)


# -- shapes and derivatives --------------------------------------------------------------------------------------------


def _forward_fake(logits: Tensor, teacher_logits: Tensor, labels: Tensor, *_: Any) -> Rows:
    return tuple(logits.new_empty(labels.shape, dtype=_rows.wide_dtype(logits)) for _ in range(5))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
    ctx.options = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


def _derivative(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.unlearn_fast.token_kl_backward(grad, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * 6


fake("token_kl", _forward_fake)
fake("token_kl_backward", lambda grad, logits, *_: logits.new_empty(logits.shape))
fake("token_kl_backward_", lambda *_: None)
differentiate("token_kl", _derivative, _setup_context)
not_twice_differentiable("token_kl_backward")
