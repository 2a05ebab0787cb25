"""Token log-probabilities from logits: the primitive under every sequence loss."""

from typing import Any

import torch
from torch import Tensor

from unlearn_fast._library import differentiate, fake, implement, not_twice_differentiable, warn_if_slow
from unlearn_fast.ops import _checks


def token_logprobs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:  # [...]
    """Log-probability of each label: `log_softmax(logits, -1)[..., label]`.

    Neither the log-softmax nor a float32 copy of the logits is stored: the forward reads the logits once, the backward
    reads them once and writes the gradient once.

    Args:
        logits: [..., V] in float32, float64, bfloat16 or float16; any strides on the leading axes, so that
            `logits[:, :-1]` needs no copy.
        labels: [...] in int64 or int32, each in [0, V) or `ignore_index`. They are not shifted here.
        ignore_index: rows with this label give 0, and an exactly zero gradient whatever their logits hold.
        inplace_backward: lets the backward overwrite the logits with their gradient, which saves the memory and the
            page faults of a second [..., V] tensor. Only for logits that nothing else reads afterwards. Ignored under
            torch.compile, which decides on memory itself.

    Returns:
        Natural logarithms shaped like `labels`, in float32 (float64 for float64 logits). Accurate relative to their own
        size as the probability tends to 1. Differentiable once, with any cotangent.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or `inplace_backward` where autograd could still
            need the logits (a leaf that requires grad, or the saved result of the operation that made them).
        RuntimeError: a label is outside [0, V) (on the CPU); logits overwritten before their backward.
    """
    _checks.floating("logits", logits)
    _checks.labels_of_rows("labels", labels, "logits", logits)
    warn_if_slow(logits.device.type)
    if inplace_backward and not torch.compiler.is_compiling() and logits.requires_grad and torch.is_grad_enabled():
        _refuse_needed_logits(logits)
        return _OverwritingLogits.apply(logits, labels, ignore_index)
    return torch.ops.unlearn_fast.token_logprobs(logits, labels, ignore_index)[0]


class _OverwritingLogits(torch.autograd.Function):
    """token_logprobs whose backward puts the gradient where the logits were."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        logp, row_max, log_sum = torch.ops.unlearn_fast.token_logprobs(logits, labels, ignore_index)
        ctx.save_for_backward(logits, labels, logp, row_max, log_sum)
        ctx.ignore_index = ignore_index
        ctx.overwritten = False
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("inplace_backward cannot be differentiated twice: leave it off")
        if ctx.overwritten:
            raise RuntimeError(
                "the logits were overwritten by an earlier backward through this graph:"
                " leave inplace_backward off where the graph is kept (retain_graph=True)"
            )
        logits, labels, logp, row_max, log_sum = ctx.saved_tensors
        ctx.overwritten = True
        target = logits.detach()
        torch.ops.unlearn_fast.token_logprobs_backward_(grad, target, labels, logp, row_max, log_sum, ctx.ignore_index)
        torch.autograd.graph.increment_version(target)
        return target, None, None


def _refuse_needed_logits(logits: Tensor) -> None:
    """Raises where overwriting the logits in the backward could change what autograd, or the caller, still reads."""
    if _checks.may_overlap(logits.shape, logits.stride()) or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise ValueError(
            "inplace_backward needs logits with stride 1 on the last axis and no overlapping (expanded) memory"
        )
    for tensor, what in ((logits, "logits"), (logits._base, "the tensor that logits is a view of")):
        if tensor is None:
            continue
        if tensor.is_leaf:
            raise ValueError(
                f"inplace_backward would overwrite {what}, a leaf that requires grad: leave it off, or clone"
            )
        if _saves_its_result(tensor):
            name = tensor.grad_fn.name() if tensor.grad_fn is not None else "?"
            raise ValueError(
                f"inplace_backward would overwrite {what}, which {name} still needs for its own backward:"
                " leave it off, or clone the logits"
            )


def _saves_its_result(tensor: Tensor) -> bool:
    """Whether the node that made the tensor saved memory of it, as tanh or exp do (a softcap, say)."""
    node: Any = tensor.grad_fn
    saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    saved += list(getattr(node, "saved_tensors", ()) or ())
    storage = tensor.untyped_storage().data_ptr()
    return any(isinstance(s, Tensor) and s.untyped_storage().data_ptr() == storage for s in saved)


# -- the operators where no kernel serves ------------------------------------------------------------------------------


def _forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernels do it: the label's term is kept out of the sum, so that log p keeps its precision as p -> 1."""
    ignored = labels == ignore_index
    label = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    row_max = wide.amax(-1)
    below = wide - row_max.unsqueeze(-1)
    log_sum = below.logsumexp(-1)
    others_over_own = below.scatter(-1, label, -torch.inf).logsumexp(-1) - below.gather(-1, label).squeeze(-1)
    logp = -torch.logaddexp(others_over_own, torch.zeros_like(others_over_own))
    logp = logp.masked_fill(row_max == torch.inf, torch.nan)  # as log_softmax has it
    return logp.masked_fill(ignored, 0), row_max, log_sum


def _backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    logp: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
) -> Tensor:
    """grad * (onehot - softmax); the label's column as grad * (1 - p), so that p -> 1 keeps its gradient."""
    ignored = labels == ignore_index
    safe = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
    p = ((logits.to(logp.dtype) - row_max.unsqueeze(-1)) - log_sum.unsqueeze(-1)).exp()
    rows = (-p).scatter(-1, safe, -logp.expm1().unsqueeze(-1)) * grad.unsqueeze(-1)
    return rows.masked_fill(ignored.unsqueeze(-1), 0).to(logits.dtype)


def _backward_(grad: Tensor, logits: Tensor, *saved: Any) -> None:
    logits.copy_(_backward(grad, logits, *saved))


implement("token_logprobs", _forward)
implement("token_logprobs_backward", _backward)
implement("token_logprobs_backward_", _backward_)


# -- shapes and derivatives --------------------------------------------------------------------------------------------


def _forward_fake(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(labels.shape, dtype=dtype) for _ in range(3))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, labels, *output)


def _derivative(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    gradient = torch.ops.unlearn_fast.token_logprobs_backward(grad, *ctx.saved_tensors, ctx.ignore_index)
    return gradient, None, None


fake("token_logprobs", _forward_fake)
fake("token_logprobs_backward", lambda grad, logits, *_: logits.new_empty(logits.shape))
fake("token_logprobs_backward_", lambda *_: None)
differentiate("token_logprobs", _derivative, _setup_context)
not_twice_differentiable("token_logprobs_backward")
