"""What the losses ask of each row of logits, and the operators that answer: the only place that calls them.

Differentiable functions for the logits forms; for the linear forms, kinds of rows with a `forward` and a `backward_`,
which overwrites the logits with their gradient. softcap is 0 for none: z = cap(x) / temperature.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from unlearn_fast.ops.token_logprobs import token_logprobs


class Rows(Protocol):
    """One number a row of logits, and its gradient. A teacher's logits, where there are any, come behind."""

    def forward(self, labels: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
        """The number first, then what `backward_` needs; 0 in rows whose label is ignored."""

    def backward_(self, grad: Tensor, labels: Tensor, saved: tuple[Tensor, ...], *logits: Tensor) -> None:
        """The first logits become their gradient; exactly 0 in rows whose label is ignored."""


class LabelRows(NamedTuple):
    """The label's log-probability."""

    ignore_index: int
    softcap: float
    temperature: float

    def forward(self, labels: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
        return _token_logprobs(logits[0], labels, *self)

    def backward_(self, grad: Tensor, labels: Tensor, saved: tuple[Tensor, ...], *logits: Tensor) -> None:
        logp, row_max, log_sum = saved
        _token_logprobs_backward_(grad, logits[0], labels, logp, row_max, log_sum, *self)


class SmoothedRows(NamedTuple):
    """Cross entropy against (1 - e) onehot + e / V: -(1 - e) log p + e (lse - mean x). Without softcap."""

    ignore_index: int
    smoothing: float

    def forward(self, labels: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
        logp, row_max, log_sum = _token_logprobs(logits[0], labels, self.ignore_index, 0.0, 1.0)
        uniform = row_max + log_sum - logits[0].mean(-1, dtype=logp.dtype)
        value = self.smoothing * uniform - (1 - self.smoothing) * logp
        return value.masked_fill(labels == self.ignore_index, 0), logp, row_max, log_sum

    def backward_(self, grad: Tensor, labels: Tensor, saved: tuple[Tensor, ...], *logits: Tensor) -> None:
        # p - (1 - e) onehot - e / V is the ordinary p - onehot, and then the difference of the two targets.
        (x,), (_, logp, row_max, log_sum) = logits, saved
        _token_logprobs_backward_(-grad, x, labels, logp, row_max, log_sum, self.ignore_index, 0.0, 1.0)
        ignored = labels == self.ignore_index
        moved = (grad * self.smoothing).masked_fill(ignored, 0).to(x.dtype).unsqueeze(-1)
        x.scatter_add_(-1, labels.masked_fill(ignored, 0).long().unsqueeze(-1), moved)
        x.sub_(moved / x.shape[-1])


class TeacherRows(NamedTuple):
    """The Kullback-Leibler divergence of the logits' softmax from the teacher's."""

    ignore_index: int
    softcap: float
    temperature: float
    label_penalty: float = 0.0

    def forward(self, labels: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
        return (token_kl(logits[0], logits[1], labels, *self),)

    def backward_(self, grad: Tensor, labels: Tensor, saved: tuple[Tensor, ...], *logits: Tensor) -> None:
        student, teacher = logits
        with torch.enable_grad():
            leaf = student.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(token_kl(leaf, teacher, labels, *self), leaf, grad)
        student.copy_(gradient)


def label_logprobs(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float, temperature: float, inplace_backward: bool
) -> Tensor:
    """`token_logprobs`, with softcap and temperature."""
    if softcap or temperature != 1:
        logits, inplace_backward = capped(logits, softcap, temperature), False
    return token_logprobs(logits, labels, ignore_index=ignore_index, inplace_backward=inplace_backward)


def token_kl(
    logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    ignore_index: int,
    softcap: float,
    temperature: float,
    label_penalty: float,
) -> Tensor:  # [...]
    """sum_j q_j (log q_j - log p_j), q = softmax(teacher's z - label_penalty * onehot(label))."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ignored = labels == ignore_index
    # Ignored rows are replaced before the softmax: a NaN there must reach neither the value nor the gradient.
    rows = [x.to(wide).masked_fill(ignored.unsqueeze(-1), 0) for x in (logits, teacher_logits.detach())]
    z, teacher = (capped(x, softcap, temperature) for x in rows)
    if label_penalty:
        label = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
        teacher = teacher.scatter_add(-1, label, torch.full_like(teacher[..., :1], -label_penalty))
    q = teacher.log_softmax(-1)
    difference = (q - z.log_softmax(-1)).masked_fill(q == -torch.inf, 0)  # 0 log 0 = 0
    return (q.exp() * difference).sum(-1).masked_fill(ignored, 0)


def capped(x: Tensor, softcap: float, temperature: float) -> Tensor:
    """z."""
    x = (x / softcap).tanh() * softcap if softcap else x
    return x / temperature if temperature != 1 else x


# -- the operator with softcap and temperature, of one that has neither: they are applied around it --------------------


def _token_logprobs(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float, temperature: float
) -> tuple[Tensor, ...]:
    """log p, row_max and log_sum."""
    return torch.ops.unlearn_fast.token_logprobs(capped(logits, softcap, temperature), labels, ignore_index)


def _token_logprobs_backward_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    logp: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
) -> None:
    slope = None
    if softcap or temperature != 1:
        z = capped(logits, softcap, temperature)
        bend = 1 - (z * (temperature / softcap)).square() if softcap else 1
        slope = bend / temperature
        logits.copy_(z)
    torch.ops.unlearn_fast.token_logprobs_backward_(grad, logits, labels, logp, row_max, log_sum, ignore_index)
    if slope is not None:
        logits.mul_(slope)
