"""The losses' forms from hidden states: those from logits, of hidden @ weight.T + bias, which are all stored."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from unlearn_fast.reference import sequences


def linear_gradient_ascent_loss(hidden: Tensor, labels: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return _one(sequences.gradient_ascent_loss, hidden, labels, weight, options)


def linear_grad_diff_loss(
    forget_hidden: Tensor,  # [B, T, H]
    forget_labels: Tensor,  # [B, T]
    retain_hidden: Tensor,  # [B, T', H]
    retain_labels: Tensor,  # [B, T']
    weight: Tensor,  # [V, H]
    *,
    retain_weight: float = 1.0,
    **options: Any,
) -> Tensor:  # []
    forget, retain = (linear(x, weight, options.get("bias")) for x in (forget_hidden, retain_hidden))
    return sequences.grad_diff_loss(
        forget, forget_labels, retain, retain_labels, retain_weight=retain_weight, **options
    )


def linear_npo_loss(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor,  # [B, T]
    weight: Tensor,  # [V, H]
    reference_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    **options: Any,
) -> Tensor:  # []
    return _one(sequences.npo_loss, hidden, labels, weight, options, reference_logps, beta=beta)


def linear_simnpo_loss(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor,  # [B, T]
    weight: Tensor,  # [V, H]
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    **options: Any,
) -> Tensor:  # []
    return _one(sequences.simnpo_loss, hidden, labels, weight, options, beta=beta, delta=delta)


def linear_dpo_loss(
    template_hidden: Tensor,  # [B, T, H]
    template_labels: Tensor,  # [B, T]
    forget_hidden: Tensor,  # [B, T', H]
    forget_labels: Tensor,  # [B, T']
    weight: Tensor,  # [V, H]
    template_reference_logps: Tensor,  # [B]
    forget_reference_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    **options: Any,
) -> Tensor:  # []
    template, forget = (linear(x, weight, options.get("bias")) for x in (template_hidden, forget_hidden))
    references = template_reference_logps, forget_reference_logps
    return sequences.dpo_loss(template, template_labels, forget, forget_labels, *references, beta=beta, **options)


def linear_wga_loss(hidden: Tensor, labels: Tensor, weight: Tensor, *, beta: float = 1.0, **options: Any) -> Tensor:
    return _one(sequences.wga_loss, hidden, labels, weight, options, beta=beta)


def linear_satimp_loss(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor,  # [B, T]
    weight: Tensor,  # [V, H]
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    **options: Any,
) -> Tensor:  # []
    return _one(sequences.satimp_loss, hidden, labels, weight, options, beta1=beta1, beta2=beta2)


def linear_ceu_loss(hidden: Tensor, labels: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return _one(sequences.ceu_loss, hidden, labels, weight, options)


def linear_kl_retain_loss(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor,  # [B, T]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [B, T, H']
    teacher_weight: Tensor,  # [V, H']
    *,
    teacher_bias: Tensor | None = None,  # [V]
    **options: Any,
) -> Tensor:  # []
    teacher = linear(teacher_hidden, teacher_weight, teacher_bias)
    return _one(sequences.kl_retain_loss, hidden, labels, weight, options, teacher)


def linear_undial_loss(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor,  # [B, T]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [B, T, H']
    teacher_weight: Tensor,  # [V, H']
    *,
    teacher_bias: Tensor | None = None,  # [V]
    strength: float = 10.0,
    **options: Any,
) -> Tensor:  # []
    teacher = linear(teacher_hidden, teacher_weight, teacher_bias)
    return _one(sequences.undial_loss, hidden, labels, weight, options, teacher, strength=strength)


def linear_sequence_logprobs(hidden: Tensor, labels: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return _one(sequences.sequence_logprobs, hidden, labels, weight, options).detach()


def _one(
    loss: Callable[..., Tensor],
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    options: dict[str, Any],
    *arguments: Tensor,
    **numbers: float,
) -> Tensor:
    return loss(linear(hidden, weight, options.get("bias")), labels, *arguments, **numbers, **options)
