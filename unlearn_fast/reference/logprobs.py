"""Token log-probabilities and divergences, from logits and from hidden states."""

import torch
from torch import Tensor

from unlearn_fast._report import TokenStatistics


def token_logprobs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    shift: bool = False,
    inplace_backward: bool = False,  # kept for the signature: the reference never overwrites the logits
) -> Tensor:
    """log_softmax(z)[..., label] in float32 (float64 for float64 logits), 0 where the label is ignored."""
    z, label, ignored = _rows(logits, labels, ignore_index, softcap, temperature, shift)
    logp = z.log_softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)
    return logp.masked_fill(ignored, 0)


def token_statistics(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    shift: bool = False,
    inplace_backward: bool = False,  # kept for the signature: the reference never overwrites the logits
) -> TokenStatistics:
    """What one pass over the logits tells of each row; 0 where the label is ignored."""
    z, label, ignored = _rows(logits, labels, ignore_index, softcap, temperature, shift)
    log_p, max_logit = z.log_softmax(-1), z.amax(-1)
    logp, own = (x.gather(-1, label.unsqueeze(-1)).squeeze(-1) for x in (log_p, z))
    lse = max_logit - log_p.amax(-1)  # NaN where log_p is, unlike logsumexp
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
    hit = (own == max_logit).to(z.dtype)
    rows = logp, lse, entropy, z.mean(-1), max_logit.detach(), hit
    return TokenStatistics(*(row.masked_fill(ignored, 0) for row in rows))


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
    inplace_backward: bool = False,  # kept for the signature: the reference never overwrites the logits
) -> Tensor:
    """sum q (log q - log p), q = softmax(teacher's z - label_penalty * onehot(label)), p = softmax(z)."""
    if labels is None:
        labels, ignore_index = logits.new_zeros(logits.shape[:-1], dtype=torch.int64), -1
    z, label, ignored = _rows(logits, labels, ignore_index, softcap, temperature, shift)
    teacher = teacher_logits.detach().to(z.dtype)
    w = _rows(teacher, labels, ignore_index, softcap, temperature, shift)[0]
    w = w - label_penalty * torch.nn.functional.one_hot(label, logits.shape[-1])
    log_p, log_q = z.log_softmax(-1), w.log_softmax(-1)
    q = log_q.exp()
    return (q * (log_q - log_p)).masked_fill(q == 0, 0).sum(-1).masked_fill(ignored, 0)


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
    chunk_bytes: int | None = None,  # kept for the signature: the reference materialises all logits
) -> Tensor:
    """token_logprobs(hidden @ weight.T + bias, labels)."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return token_logprobs(
        logits, labels, ignore_index=ignore_index, softcap=softcap, temperature=temperature, shift=shift
    )


def _rows(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float | None, temperature: float, shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """z = softcap * tanh(logits / softcap) / temperature, labels that are safe to gather by, and what is ignored."""
    if shift:
        last = labels.new_full((*labels.shape[:-1], min(labels.shape[-1], 1)), ignore_index)
        labels = torch.cat([labels[..., 1:], last], -1)
    ignored = labels == ignore_index
    # Ignored rows are replaced before the softmax: a NaN there must reach neither the value nor the gradient.
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(dtype).masked_fill(ignored.unsqueeze(-1), 0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature, labels.masked_fill(ignored, 0).long(), ignored
