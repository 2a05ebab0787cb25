"""What the linear forms ask of each row of logits, and the operators that answer.

A kind of rows has a `forward`, and a `backward_` that overwrites the logits with their gradient. softcap is 0 for none:
z = cap(x) / temperature.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


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
        return torch.ops.unlearn_fast.token_logprobs(logits[0], labels, *self, False)[:3]

    def backward_(self, grad: Tensor, labels: Tensor, saved: tuple[Tensor, ...], *logits: Tensor) -> None:
        entropy = grad.new_empty(0)  # no cotangent asks for it
        backward_ = torch.ops.unlearn_fast.token_logprobs_backward_
        backward_(grad, None, None, None, logits[0], labels, *saved, entropy, *self)


class SmoothedRows(NamedTuple):
    """Cross entropy against (1 - e) onehot + e / V: -(1 - e) log p + e (lse - mean x). Without softcap."""

    ignore_index: int
    smoothing: float

    def forward(self, labels: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
        found = torch.ops.unlearn_fast.token_logprobs(logits[0], labels, self.ignore_index, 0.0, 1.0, True)
        logp, row_max, log_sum, entropy, mean_logit, _ = found
        value = self.smoothing * (row_max + log_sum - mean_logit) - (1 - self.smoothing) * logp
        return value, logp, row_max, log_sum, entropy

    def backward_(self, grad: Tensor, labels: Tensor, saved: tuple[Tensor, ...], *logits: Tensor) -> None:
        of_uniform = self.smoothing * grad
        grads = (self.smoothing - 1) * grad, of_uniform, None, -of_uniform  # of log p, lse, entropy and mean logit
        backward_ = torch.ops.unlearn_fast.token_logprobs_backward_
        backward_(*grads, logits[0], labels, *saved[1:], self.ignore_index, 0.0, 1.0)


class TeacherRows(NamedTuple):
    """The Kullback-Leibler divergence of the logits' softmax from the teacher's."""

    ignore_index: int
    softcap: float
    temperature: float
    label_penalty: float = 0.0

    def forward(self, labels: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.unlearn_fast.token_kl(*logits, labels, *self)

    def backward_(self, grad: Tensor, labels: Tensor, saved: tuple[Tensor, ...], *logits: Tensor) -> None:
        torch.ops.unlearn_fast.token_kl_backward_(grad, *logits, labels, *saved[1:], *self)
