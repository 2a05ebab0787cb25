"""Token log-probabilities from logits, and what else one pass can tell: the primitive under every sequence loss."""

from typing import Any

import torch
from torch import Tensor

from unlearn_fast._library import differentiate, fake, implement, not_twice_differentiable, warn_if_slow
from unlearn_fast._report import TokenStatistics
from unlearn_fast.ops import _checks, _rows

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def token_logprobs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    shift: bool = False,
    inplace_backward: bool = False,
) -> Tensor:  # [...]
    """Log-probability of each label: `log_softmax(z, -1)[..., label]`, where z is the logits, or a scaled form of them.

    With a softcap, z = softcap * tanh(logits / softcap) / temperature; without, z = logits / temperature.

    Neither the log-softmax, nor z, nor a float32 copy of the logits is stored: the forward reads the logits once, the
    backward reads them once and writes the gradient once.

    Args:
        logits: [..., V] in float32, float64, bfloat16 or float16; any strides on the leading axes, so that
            `logits[:, :-1]` needs no copy.
        labels: [...] in int64 or int32, each in [0, V) or `ignore_index`.
        ignore_index: rows with this label give 0, and an exactly zero gradient whatever their logits hold.
        softcap: the cap of the logits, above 0, or None.
        temperature: above 0.
        shift: labels [..., T] are aligned with the input tokens: position t is scored on label t + 1, and the last
            position is ignored. The labels are moved; the logits are not copied.
        inplace_backward: lets the backward overwrite the logits with their gradient, which saves the memory and the
            page faults of a second [..., V] tensor. Only for logits that nothing else reads afterwards. Ignored under
            torch.compile, which decides on memory itself.

    Returns:
        Natural logarithms shaped like `labels`, in float32 (float64 for float64 logits). Accurate relative to their own
        size as the probability tends to 1. Differentiable once, with any cotangent.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit, or `inplace_backward` where autograd could
            still need the logits (a leaf that requires grad, or the saved result of the operation that made them).
        RuntimeError: a label is outside [0, V) (on the CPU); logits overwritten before their backward.
    """
    warn_if_slow(logits.device.type)
    return _rows_of(logits, labels, ignore_index, softcap, temperature, shift, inplace_backward, False)[0]


def token_statistics(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    shift: bool = False,
    inplace_backward: bool = False,
) -> TokenStatistics:  # of [...]
    """What one pass over the logits tells of each row, beside the label's log-probability.

    With z as in `token_logprobs` and p = softmax(z):
        logp = z_label - lse;  lse = log sum_j exp(z_j);  entropy = -sum_j p_j log p_j;  mean_logit = mean_j z_j;
        max_logit = max_j z_j;  hit = 1 where z_label equals max_logit, else 0.

    The arguments and the errors of `token_logprobs`; rows with `ignore_index` give 0 in every output.

    Returns:
        Tensors shaped like `labels`, in float32 (float64 for float64 logits). logp, lse, entropy and mean_logit are
        differentiable once, in any combination, by one backward pass. A row that holds +inf or NaN, or nothing but
        -inf, has NaN for logp, lse and entropy.
    """
    warn_if_slow(logits.device.type)
    rows = _rows_of(logits, labels, ignore_index, softcap, temperature, shift, inplace_backward, True)
    logp, row_max, log_sum, entropy, mean_logit, hit = rows
    return TokenStatistics(logp, row_max + log_sum, entropy, mean_logit, row_max, hit)


def _rows_of(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
    shift: bool,
    inplace_backward: bool,
    statistics: bool,
) -> Rows:
    """Checks, and the operator's outputs. lse is row_max + log_sum: log_sum passes lse's gradient on, row_max none."""
    _checks.floating("logits", logits)
    _checks.labels_of_rows("labels", labels, "logits", logits)
    cap = _rows.check_scaling(softcap, temperature)
    if shift:
        labels = _rows.next_labels(labels, ignore_index)
    arguments = logits, labels, ignore_index, cap, float(temperature), statistics
    if inplace_backward and _rows.may_overwrite(logits):
        _rows.refuse_needed_logits(logits)
        return _OverwritingLogits.apply(*arguments)
    return torch.ops.unlearn_fast.token_logprobs(*arguments)


class _OverwritingLogits(torch.autograd.Function):
    """token_logprobs whose backward puts the gradient where the logits were."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Rows:
        output = torch.ops.unlearn_fast.token_logprobs(*arguments)
        _setup_context(ctx, arguments, output)
        ctx.overwritten = False
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _rows.overwrite_once(ctx)
        arguments = _backward_arguments(ctx, grads)
        logits = arguments[4].detach()
        torch.ops.unlearn_fast.token_logprobs_backward_(*arguments[:4], logits, *arguments[5:])
        torch.autograd.graph.increment_version(logits)
        return logits, None, None, None, None, None


# -- the operators where no kernel serves ------------------------------------------------------------------------------


def _forward(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float, temperature: float, statistics: bool
) -> Rows:
    """As the kernels do it: the label's term is kept out of the sum, so that log p keeps its precision as p -> 1."""
    ignored = labels == ignore_index
    label = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
    z = _rows.scaled(logits.to(_rows.wide_dtype(logits)), softcap, temperature)
    row_max = z.amax(-1)
    below = z - row_max.unsqueeze(-1)
    log_sum = below.logsumexp(-1)
    own = below.gather(-1, label).squeeze(-1)
    others_over_own = below.scatter(-1, label, -torch.inf).logsumexp(-1) - own
    logp = -torch.logaddexp(others_over_own, torch.zeros_like(others_over_own))
    logp = logp.masked_fill(row_max == torch.inf, torch.nan)  # as log_softmax has it
    rows = [logp, row_max, log_sum]
    if statistics:
        log_p = below - log_sum.unsqueeze(-1)
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
        rows += [entropy, z.mean(-1), (own == 0).to(z.dtype)]
    results = [row.masked_fill(ignored, 0) for row in rows]
    return tuple(results + [z.new_empty(0) for _ in range(6 - len(rows))])  # type: ignore[return-value]


def _backward(
    grad_logp: Tensor,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_mean: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    logp: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
) -> Tensor:
    """dz = p * (l - g - h * (log p + entropy)) + onehot * g + m / V; the label's p - 1 as expm1(log p), since p -> 1
    must keep its gradient."""
    ignored = labels == ignore_index
    label = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
    wide = logits.to(logp.dtype)
    log_p = _rows.scaled(wide, softcap, temperature) - row_max.unsqueeze(-1) - log_sum.unsqueeze(-1)
    p = log_p.exp()
    others = torch.zeros_like(logp) if grad_lse is None else grad_lse
    gradient = p * (others - grad_logp).unsqueeze(-1)
    own = -grad_logp * logp.expm1() + others * logp.exp()
    gradient.scatter_(-1, label, own.unsqueeze(-1))
    if grad_entropy is not None:
        terms = p * (log_p.masked_fill(p == 0, 0) + entropy.unsqueeze(-1))
        gradient -= grad_entropy.unsqueeze(-1) * terms
    if grad_mean is not None:
        gradient += grad_mean.unsqueeze(-1) / logits.shape[-1]
    gradient = gradient * _rows.slope(wide, softcap, temperature)
    return gradient.masked_fill(ignored.unsqueeze(-1), 0).to(logits.dtype)


def _backward_(*arguments: Any) -> None:
    arguments[4].copy_(_backward(*arguments))


implement("token_logprobs", _forward)
implement("token_logprobs_backward", _backward)
implement("token_logprobs_backward_", _backward_)


# -- shapes and derivatives --------------------------------------------------------------------------------------------


def _forward_fake(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float, temperature: float, statistics: bool
) -> Rows:
    shapes = [labels.shape if index < 3 or statistics else (0,) for index in range(6)]
    return tuple(logits.new_empty(shape, dtype=_rows.wide_dtype(logits)) for shape in shapes)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
    logits, labels, ctx.ignore_index, ctx.softcap, ctx.temperature, statistics = inputs
    logp, row_max, log_sum, entropy, mean_logit, hit = output
    ctx.mark_non_differentiable(row_max, hit, *(() if statistics else (entropy, mean_logit)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, logp, row_max, log_sum, entropy)


def _backward_arguments(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    logits, labels, logp, row_max, log_sum, entropy = ctx.saved_tensors
    grad_logp, _, grad_lse, grad_entropy, grad_mean, _ = grads
    if grad_logp is None:
        grad_logp = torch.zeros_like(logp)
    saved = logits, labels, logp, row_max, log_sum, entropy
    return grad_logp, grad_lse, grad_entropy, grad_mean, *saved, ctx.ignore_index, ctx.softcap, ctx.temperature


def _derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.unlearn_fast.token_logprobs_backward(*_backward_arguments(ctx, grads))
    return gradient, None, None, None, None, None


fake("token_logprobs", _forward_fake)
fake("token_logprobs_backward", lambda *arguments: arguments[4].new_empty(arguments[4].shape))
fake("token_logprobs_backward_", lambda *_: None)
differentiate("token_logprobs", _derivative, _setup_context)
not_twice_differentiable("token_logprobs_backward")
