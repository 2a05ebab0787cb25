"""Losses of sequences' log-probabilities: gradient ascent and its weighted kin, and preferences (NPO, SimNPO, DPO).

In the formulas, over the labelled tokens t of sequence b, p_t is the probability of the label, L_b = sum_t log p_t,
n_b their number, mean_t the mean over them, and E_b the mean over all B sequences.
"""

from functools import partial
from typing import Any

from torch import Tensor

from unlearn_fast.losses import values
from unlearn_fast.losses.forms import (
    LinearOptions,
    LogitsOptions,
    check_sides,
    from_hidden,
    from_logits,
    plan,
)
from unlearn_fast.losses.linear import Unit, values_of_sequences
from unlearn_fast.ops._rows import next_labels


def gradient_ascent_loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:  # [B, T, V], [B, T] -> []
    """E_b mean_t log p_t: minimising it lowers the probability of the labels, without bound.

    The contract of all losses of this file:

    Args:
        logits: [B, T, V] in float32, float64, bfloat16 or float16.
        labels: [B, T] in int64 or int32, aligned with the input tokens; the shift by one happens inside. `ignore_index`
            marks the tokens that are no part of the answer.
        options: see `LogitsOptions`; for the linear form, see `LinearOptions`.

    Returns:
        0-dim float32 (float64 for float64 logits): the mean over the B sequences. A sequence without a labelled token
        adds 0, and has no gradient.

    Raises:
        ValueError, TypeError: an argument or option does not fit.
        RuntimeError: a label outside [0, V) (on the CPU).
    """
    return from_logits(values.gradient_ascent, {"": (logits, labels)}, {}, options)


def linear_gradient_ascent_loss(hidden: Tensor, labels: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """`gradient_ascent_loss` of the logits hidden @ weight.T + bias, which are never stored.

    The contract of all linear forms: hidden [B, T, H], weight [V, H] and bias [V] have one dtype. Chunks of whole
    sequences are computed at a time, at most `chunk_bytes` of logits (a sequence with more is computed in pieces; only
    NPO, SimNPO, DPO and FLAT then compute some logits twice), and their gradients in the same pass: 6 N H V
    floating-point operations for N rows, 4 N H V where weight or hidden states are frozen, 2 N H V without gradients.
    On the CPU, ignored rows cost nothing. One backward only: the second one is an error. The gradients are computed
    before the factor that comes from upstream, so that a float16 loss scale would come too late.
    """
    return from_hidden(values.gradient_ascent, {"": (hidden, labels)}, weight, {}, options, Unit.ROW)


def grad_diff_loss(
    forget_logits: Tensor,  # [B, T, V]
    forget_labels: Tensor,  # [B, T]
    retain_logits: Tensor,  # [B, T', V]
    retain_labels: Tensor,  # [B, T']
    *,
    retain_weight: float = 1.0,
    **options: Any,
) -> Tensor:  # []
    """GradDiff: E_b mean_t log p_t over the forget side - retain_weight * the same over the retain side.

    Ascent on what is to be forgotten, descent on what is to be kept. See `gradient_ascent_loss`. The sides may differ
    in T, not in B.
    """
    sides = {"forget_": (forget_logits, forget_labels), "retain_": (retain_logits, retain_labels)}
    return from_logits(partial(values.grad_diff, retain_weight=retain_weight), sides, {}, options)


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
    """`grad_diff_loss` of the logits hidden @ weight.T + bias; see `linear_gradient_ascent_loss`."""
    sides = {"forget_": (forget_hidden, forget_labels), "retain_": (retain_hidden, retain_labels)}
    return from_hidden(partial(values.grad_diff, retain_weight=retain_weight), sides, weight, {}, options, Unit.ROW)


def npo_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    reference_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    **options: Any,
) -> Tensor:  # []
    """NPO: E_b -(2 / beta) logsigmoid(-beta (L_b - reference_logps_b)).

    Lowers the probability of the labels, relative to a reference model's; bounded below by 0. As beta tends to 0 its
    gradient becomes that of gradient ascent on L_b. See `gradient_ascent_loss`.

    Args:
        reference_logps: L_b under the reference model, the model before unlearning: see `sequence_logprobs`.
        beta: positive; how soon a sequence that is already unlikely is left alone.

    Source: Zhang et al., "Negative Preference Optimization", COLM 2024 (arXiv 2404.05868).
    """
    constants = {"reference_logps": reference_logps}
    return from_logits(partial(values.npo, beta=_positive(beta)), {"": (logits, labels)}, constants, options)


def linear_npo_loss(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor,  # [B, T]
    weight: Tensor,  # [V, H]
    reference_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    **options: Any,
) -> Tensor:  # []
    """`npo_loss` of the logits hidden @ weight.T + bias; see `linear_gradient_ascent_loss`."""
    constants = {"reference_logps": reference_logps}
    return from_hidden(partial(values.npo, beta=_positive(beta)), {"": (hidden, labels)}, weight, constants, options)


def simnpo_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    **options: Any,
) -> Tensor:  # []
    """SimNPO: E_b -(2 / beta) logsigmoid(beta (-L_b / n_b - delta)): NPO by length, without a reference model.

    `delta` is the mean negative log-probability at which a sequence counts as forgotten. See `gradient_ascent_loss`.

    Source: Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", 2024
    (arXiv 2410.07163), whose gamma is beta * delta.
    """
    value = partial(values.simnpo, beta=_positive(beta), delta=delta)
    return from_logits(value, {"": (logits, labels)}, {}, options)


def linear_simnpo_loss(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor,  # [B, T]
    weight: Tensor,  # [V, H]
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    **options: Any,
) -> Tensor:  # []
    """`simnpo_loss` of the logits hidden @ weight.T + bias; see `linear_gradient_ascent_loss`."""
    value = partial(values.simnpo, beta=_positive(beta), delta=delta)
    return from_hidden(value, {"": (hidden, labels)}, weight, {}, options)


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
    """DPO, as AltPO uses it: E_b -(2 / beta) logsigmoid(beta (template ratio_b - forget ratio_b)).

    A ratio is L_b less its reference: the template answer is preferred to the forget answer to the same question. With
    the factor 2 / beta of NPO, which is what remains without the template. See `gradient_ascent_loss`; a pair with an
    answer without a labelled token adds 0.

    Args:
        template_reference_logps, forget_reference_logps: L_b under the reference model, see `sequence_logprobs`.

    Source: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023 (arXiv 2305.18290); Mekala et al.,
    "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models", 2024
    (arXiv 2409.13474).
    """
    sides = {"template_": (template_logits, template_labels), "forget_": (forget_logits, forget_labels)}
    constants = {
        "template_reference_logps": template_reference_logps,
        "forget_reference_logps": forget_reference_logps,
    }
    return from_logits(partial(values.dpo, beta=_positive(beta)), sides, constants, options)


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
    """`dpo_loss` of the logits hidden @ weight.T + bias; see `linear_gradient_ascent_loss`."""
    sides = {"template_": (template_hidden, template_labels), "forget_": (forget_hidden, forget_labels)}
    constants = {
        "template_reference_logps": template_reference_logps,
        "forget_reference_logps": forget_reference_logps,
    }
    return from_hidden(partial(values.dpo, beta=_positive(beta)), sides, weight, constants, options)


def wga_loss(logits: Tensor, labels: Tensor, *, beta: float = 1.0, **options: Any) -> Tensor:
    """WGA, weighted gradient ascent: E_b mean_t p_t^beta log p_t, the weight p_t^beta without a gradient.

    Tokens that are forgotten already weigh little. See `gradient_ascent_loss`.

    Source: Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025
    (arXiv 2502.19301).
    """
    return from_logits(partial(values.wga, beta=beta), {"": (logits, labels)}, {}, options)


def linear_wga_loss(hidden: Tensor, labels: Tensor, weight: Tensor, *, beta: float = 1.0, **options: Any) -> Tensor:
    """`wga_loss` of the logits hidden @ weight.T + bias; see `linear_gradient_ascent_loss`."""
    return from_hidden(partial(values.wga, beta=beta), {"": (hidden, labels)}, weight, {}, options, Unit.ROW)


def satimp_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    **options: Any,
) -> Tensor:  # []
    """SatImp: E_b mean_t p_t^beta1 (1 - p_t)^beta2 log p_t, the weights (saturation, importance) without a gradient.

    See `gradient_ascent_loss`.

    Source: Yang et al., "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025
    (arXiv 2505.11953).
    """
    return from_logits(partial(values.satimp, beta1=beta1, beta2=beta2), {"": (logits, labels)}, {}, options)


def linear_satimp_loss(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor,  # [B, T]
    weight: Tensor,  # [V, H]
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    **options: Any,
) -> Tensor:  # []
    """`satimp_loss` of the logits hidden @ weight.T + bias; see `linear_gradient_ascent_loss`."""
    value = partial(values.satimp, beta1=beta1, beta2=beta2)
    return from_hidden(value, {"": (hidden, labels)}, weight, {}, options, Unit.ROW)


def ceu_loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:  # [B, T, V], [B, T] -> []
    """CE-U, cross entropy unlearning: E_b mean_t -log(1 - p_t), bounded below by 0.

    The cross entropy with the model's own distribution after the label has been taken out, less the entropy of that,
    which has no gradient there. d/dz = p_y / (1 - p_y) * (onehot - p). See `gradient_ascent_loss`.

    Source: Yang, "CE-U: Cross Entropy Unlearning", 2025 (arXiv 2503.01224).
    """
    return from_logits(values.ceu, {"": (logits, labels)}, {}, options)


def linear_ceu_loss(hidden: Tensor, labels: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """`ceu_loss` of the logits hidden @ weight.T + bias; see `linear_gradient_ascent_loss`."""
    return from_hidden(values.ceu, {"": (hidden, labels)}, weight, {}, options, Unit.ROW)


def sequence_logprobs(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:  # [B, T, V], [B, T] -> [B]
    """L_b, the summed log-probability of each sequence's labelled tokens, shifted by one inside.

    Under torch.no_grad, for a reference model, what NPO and DPO take. Options of `LogitsOptions`; 0 for a sequence
    without a labelled token.
    """
    given = LogitsOptions(**options)
    check_sides("logits", {"": (logits, labels)})
    return given.logprobs(logits, next_labels(labels, given.ignore_index)).sum(1)


def linear_sequence_logprobs(hidden: Tensor, labels: Tensor, weight: Tensor, **options: Any) -> Tensor:  # [B]
    """`sequence_logprobs` of the logits hidden @ weight.T + bias, which are never stored; without a gradient.

    Options of `LinearOptions`.
    """
    sides = {"": (hidden, labels)}
    return values_of_sequences(*plan(lambda logp, _: logp.sum(1), sides, weight, {}, LinearOptions(**options)))


def _positive(beta: float) -> float:
    if not beta > 0:
        raise ValueError(f"beta is {beta}: it must be positive")
    return beta
