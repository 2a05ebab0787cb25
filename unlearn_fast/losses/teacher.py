"""Losses against a teacher's distributions: what is to be kept stays (KL), what is to be forgotten fades (UNDIAL).

q is the softmax of the teacher's logits and p that of ours, under one softcap and temperature. The teacher has no
gradient, and may have a dtype of its own.
"""

from typing import Any

from torch import Tensor

from unlearn_fast.losses.forms import from_teacher_hidden, from_teacher_logits
from unlearn_fast.losses.linear import Head
from unlearn_fast.losses.values import per_token


def kl_retain_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    teacher_logits: Tensor,  # [B, T, V]
    **options: Any,
) -> Tensor:  # []
    """E_b mean_t KL(q_t || p_t) over the positions whose next token is labelled.

    Keeps a model near the one that it was, on data to be retained. The labels only mark tokens. Otherwise the contract
    of `gradient_ascent_loss`.

    Source: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024 (arXiv 2401.06121).
    """
    return from_teacher_logits(per_token, logits, labels, teacher_logits, 0.0, options)


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
    """`kl_retain_loss` of the logits hidden @ weight.T + bias and the teacher's, none of which are ever stored.

    Costs the teacher's logits on top, 2 N H' V; `chunk_bytes` counts both. See `linear_gradient_ascent_loss`; `shard`
    is not supported.
    """
    teacher = Head([teacher_hidden], teacher_weight, teacher_bias)
    return from_teacher_hidden(per_token, hidden, labels, weight, teacher, 0.0, options)


def undial_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    teacher_logits: Tensor,  # [B, T, V]
    *,
    strength: float = 10.0,
    **options: Any,
) -> Tensor:  # []
    """UNDIAL: E_b mean_t KL(q_t || p_t) with q = softmax(teacher's z - strength * onehot(label)).

    Distils the teacher with the label's logit lowered. The published cross entropy with q less the entropy of q, which
    has no gradient: 0 where the student has learned it. Otherwise the contract of `gradient_ascent_loss`.

    Source: Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language
    Models", NAACL 2025 (arXiv 2402.10052).
    """
    return from_teacher_logits(per_token, logits, labels, teacher_logits, strength, options)


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
    """`undial_loss` of the logits hidden @ weight.T + bias and the teacher's; see `linear_kl_retain_loss`."""
    teacher = Head([teacher_hidden], teacher_weight, teacher_bias)
    return from_teacher_hidden(per_token, hidden, labels, weight, teacher, strength, options)
