"""The family of unlearning losses: the published formulas, sequence by sequence. Options are those of the losses."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, logsigmoid


def gradient_ascent_loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The mean log-probability of a sequence's labels: minus its ordinary loss."""
    return _mean(lambda answer: -cross_entropy(*answer), (logits, labels), options)


def grad_diff_loss(
    forget_logits: Tensor,  # [B, T, V]
    forget_labels: Tensor,  # [B, T]
    retain_logits: Tensor,  # [B, T', V]
    retain_labels: Tensor,  # [B, T']
    *,
    retain_weight: float = 1.0,
    **options: Any,
) -> Tensor:  # []
    """Ascent on the forget side, descent on the retain side."""
    ascent = gradient_ascent_loss(forget_logits, forget_labels, **options)
    return ascent - retain_weight * gradient_ascent_loss(retain_logits, retain_labels, **options)


def npo_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    reference_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    **options: Any,
) -> Tensor:  # []
    """-(2 / beta) log sigmoid(-beta log(pi / pi_ref))."""

    def value(answer: tuple[Tensor, Tensor], reference: Tensor) -> Tensor:
        nll = cross_entropy(*answer, reduction="sum")
        return -2 / beta * logsigmoid(-beta * (-nll - reference))

    return _mean(value, (logits, labels), options, reference_logps)


def simnpo_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    **options: Any,
) -> Tensor:  # []
    """-(2 / beta) log sigmoid(-(beta / n) log pi - gamma), gamma = beta * delta."""

    def value(answer: tuple[Tensor, Tensor]) -> Tensor:
        return -2 / beta * logsigmoid(beta * cross_entropy(*answer) - beta * delta)

    return _mean(value, (logits, labels), options)


def dpo_loss(
    template_logits: Tensor,  # [B, T, V]
    template_labels: Tensor,  # [B, T]
    forget_logits: Tensor,  # [B, T', V]
    forget_labels: Tensor,  # [B, T']
    template_reference_logps: Tensor,  # [B]
    forget_reference_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    **options: Any,
) -> Tensor:  # []
    """-(2 / beta) log sigmoid(beta (log(pi / pi_ref) of the template - that of the forget answer))."""
    loss = _zero(template_logits) + _zero(forget_logits)
    templates = _answers(template_logits, template_labels, options)
    forgets = _answers(forget_logits, forget_labels, options)
    for b, (template, forget) in enumerate(zip(templates, forgets, strict=True)):
        if len(template[1]) and len(forget[1]):
            won = -cross_entropy(*template, reduction="sum") - template_reference_logps[b]
            lost = -cross_entropy(*forget, reduction="sum") - forget_reference_logps[b]
            loss = loss - 2 / beta * logsigmoid(beta * (won - lost))
    return loss / max(len(template_logits), 1)


def wga_loss(logits: Tensor, labels: Tensor, *, beta: float = 1.0, **options: Any) -> Tensor:
    """mean p^beta log p with a constant weight."""

    def value(answer: tuple[Tensor, Tensor]) -> Tensor:
        nll = cross_entropy(*answer, reduction="none")
        return -((-nll).exp().detach() ** beta * nll).mean()

    return _mean(value, (logits, labels), options)


def satimp_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    **options: Any,
) -> Tensor:  # []
    """mean p^beta1 (1 - p)^beta2 log p with constant weights."""

    def value(answer: tuple[Tensor, Tensor]) -> Tensor:
        nll = cross_entropy(*answer, reduction="none")
        p = (-nll).exp().detach()
        return -(p**beta1 * (1 - p) ** beta2 * nll).mean()

    return _mean(value, (logits, labels), options)


def ceu_loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """mean KL(q || p), q the constant distribution of the logits with the label's at minus infinity."""

    def value(answer: tuple[Tensor, Tensor]) -> Tensor:
        z, y = answer
        q = z.detach().scatter(1, y.unsqueeze(1), -torch.inf).log_softmax(-1)
        return _kl(q, z.log_softmax(-1)).mean()

    return _mean(value, (logits, labels), options)


def kl_retain_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    teacher_logits: Tensor,  # [B, T, V]
    **options: Any,
) -> Tensor:  # []
    """mean KL(teacher || student)."""
    return undial_loss(logits, labels, teacher_logits, strength=0.0, **options)


def undial_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    teacher_logits: Tensor,  # [B, T, V]
    *,
    strength: float = 10.0,
    **options: Any,
) -> Tensor:  # []
    """mean KL(q || student), q the softmax of the teacher's logits with the label's lowered by the strength."""
    loss = _zero(logits)
    teachers = _answers(teacher_logits.detach(), labels, options)
    for (z, y), (teacher, _) in zip(_answers(logits, labels, options), teachers, strict=True):
        if len(y):
            lowered = teacher - strength * torch.nn.functional.one_hot(y, z.shape[-1])
            loss = loss + _kl(lowered.log_softmax(-1), z.log_softmax(-1)).mean()
    return loss / max(len(logits), 1)


def sequence_logprobs(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The summed log-probability of each sequence's labels."""
    sums = [-cross_entropy(*answer, reduction="sum") for answer in _answers(logits, labels, options)]
    return torch.stack(sums) if sums else _zero(logits).expand(0)


def linear_cross_entropy(
    input: Tensor,  # [..., H]
    linear_weight: Tensor,  # [V, H]
    target: Tensor,  # [...]
    *,
    linear_bias: Tensor | None = None,  # [V]
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,  # kept for the signature, as the next one
    weight_grad_dtype: torch.dtype | None = None,
) -> Tensor:  # [], or [...]
    """cross_entropy of the logits of the targets that count."""
    y = target.reshape(-1).long()
    kept = y != ignore_index
    z = _wide(linear(input.reshape(-1, input.shape[-1])[kept], linear_weight, linear_bias))
    values = cross_entropy(z, y[kept], reduction="none", label_smoothing=label_smoothing)
    if reduction == "none":
        return values.new_zeros(len(y)).masked_scatter(kept, values).view(target.shape)
    return values.sum() / (max(len(values), 1) if reduction == "mean" else 1)


def _mean(
    value: Callable[..., Tensor], side: tuple[Tensor, Tensor], options: dict[str, Any], *constants: Any
) -> Tensor:
    """The mean over sequences of value((logits, labels) of the labelled tokens, constants of the sequence)."""
    answers = _answers(*side, options)
    values = [value(a, *(c[b] for c in constants)) for b, a in enumerate(answers) if len(a[1])]
    return sum(values, _zero(side[0])) / max(len(answers), 1)


def _answers(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The logits and labels [n, V] and [n] of each sequence's labelled tokens."""
    answers = []
    for z, y in zip(logits[:, :-1], labels[:, 1:].long(), strict=True):
        labelled = y != options.get("ignore_index", -100)
        answers.append((_scaled(_wide(z[labelled]), options), y[labelled]))
    return answers


def _scaled(z: Tensor, options: dict[str, Any]) -> Tensor:
    softcap = options.get("softcap") or math.inf
    z = z if softcap == math.inf else softcap * torch.tanh(z / softcap)
    return z / options.get("temperature", 1.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _zero(logits: Tensor) -> Tensor:
    """A zero that carries a gradient, whatever the logits hold."""
    return _wide(logits[:0]).sum()


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p).masked_fill(log_q == -torch.inf, 0)).sum(-1)
