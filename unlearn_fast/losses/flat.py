"""FLAT: unlearning from forget data only, by adjusting the loss between a template answer and the forget answer.

Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", ICLR 2025 (arXiv 2410.11143). Released code:
UCSC-REAL/FLAT, `dataloader.py`, loss type `cl`.

The vocabulary-sized work is done by `token_logprobs` and `linear_token_logprobs`; the rest is plain torch on [B, T].
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unlearn_fast.losses.divergences import REVERSED, Divergence, Formulation, find_divergence
from unlearn_fast.ops import _checks
from unlearn_fast.ops._rows import next_labels
from unlearn_fast.ops.linear_token_logprobs import DEFAULT_CHUNK_BYTES, linear_token_logprobs
from unlearn_fast.ops.token_logprobs import token_logprobs


def flat_loss(
    template_logits: Tensor,  # [B, T, V]
    template_labels: Tensor,  # [B, T]
    forget_logits: Tensor,  # [B, T', V]
    forget_labels: Tensor,  # [B, T']
    *,
    divergence: str = "total_variation",
    formulation: Formulation = "paper",
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:  # []
    """The FLAT loss A(e) - C(f): raises the probability `e` of the template answer, lowers `f`, the forget answer's.

    With p_t = softmax(logits[b, t])[labels[b, t + 1]], the probability of a labelled token, both answers given to the
    same B questions, and A and C from the table in `unlearn_fast.losses.divergences`:

    * formulation="paper":    P_b = mean of p_t over the labelled tokens of sequence b;  loss = mean_b A(e_b) - C(f_b).
      Independent of padding and of a split into equal micro-batches.
    * formulation="official": P = sum of all p_t / (B * (T - 1));  loss = A(e) - C(f). Unlabelled positions count as
      zeros, so padding changes the loss, as in the released code. The divergences "reverse_kl", "squared_hellinger" and
      "neyman" keep the released signs, which push the template probability down: a UserWarning says so (not from
      inside torch.compile).

    Args:
        template_logits, forget_logits: float32, float64, bfloat16 or float16. The sides may differ in T, not in B.
        template_labels, forget_labels: int64 or int32, aligned with the input tokens; the shift by one happens inside.
            `ignore_index` marks the tokens that are no part of the answer.
        divergence: "kl", "jeffrey", "pearson", "jensen_shannon", "total_variation", "reverse_kl", "squared_hellinger"
            or "neyman".
        inplace_backward: the backward writes each gradient over its logits, whose values are lost; saves one [B, T, V]
            buffer a side. See `token_logprobs`; the two sides must not be views of one tensor.

    Returns:
        0-dim float32 (float64 for float64 logits). A sequence without a labelled token adds 0 to its side's mean over
        the B sequences, and so does, in the official form, a side without one; their gradient is 0.

    Raises:
        ValueError: unknown divergence or formulation, shapes that do not fit, a different B on the two sides.
        TypeError: a dtype that does not fit.
        RuntimeError: a label outside [0, V) (on the CPU).
    """
    terms = _terms(divergence, formulation)
    sides = template_logits, template_labels, forget_logits, forget_labels
    return _flat_loss(terms, *sides, formulation, ignore_index, inplace_backward)


def flat_template_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    divergence: str = "total_variation",
    formulation: Formulation = "paper",
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:  # []
    """The template side of `flat_loss` alone, A(e).

    `flat_template_loss(...) + flat_forget_loss(...)` is exactly `flat_loss(...)`, in value and gradient: with forward
    and backward one side at a time, only one side's activations live at once.
    """
    terms = _terms(divergence, formulation)
    _check("", "logits", logits, labels)
    return _logits_side(terms.template, logits, labels, formulation, ignore_index, inplace_backward)


def flat_forget_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    divergence: str = "total_variation",
    formulation: Formulation = "paper",
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:  # []
    """The forget side of `flat_loss` alone, -C(f); see `flat_template_loss`."""
    terms = _terms(divergence, formulation)
    _check("", "logits", logits, labels)
    return -_logits_side(terms.forget, logits, labels, formulation, ignore_index, inplace_backward)


def linear_flat_loss(
    template_hidden: Tensor,  # [B, T, H]
    template_labels: Tensor,  # [B, T]
    forget_hidden: Tensor,  # [B, T', H]
    forget_labels: Tensor,  # [B, T']
    weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,  # [V]
    divergence: str = "total_variation",
    formulation: Formulation = "paper",
    ignore_index: int = -100,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:  # []
    """`flat_loss` of the logits hidden @ weight.T + bias, without ever storing them.

    Neither the [B, T, V] logits nor their gradient are allocated, only chunks of at most about `chunk_bytes`. Otherwise
    the arguments, the result and the errors of `flat_loss`.
    """
    terms = _terms(divergence, formulation)
    _check("template_", "hidden", template_hidden, template_labels)
    _check("forget_", "hidden", forget_hidden, forget_labels)
    _check_same_questions("hidden", template_hidden, forget_hidden)
    template_targets = next_labels(template_labels, ignore_index)
    forget_targets = next_labels(forget_labels, ignore_index)
    # One call for both sides: one [V, H] gradient of the weight instead of two and their sum.
    logp = linear_token_logprobs(
        torch.cat([template_hidden, forget_hidden], dim=1),
        weight,
        torch.cat([template_targets, forget_targets], dim=1),
        bias=bias,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
    )
    template_logp, forget_logp = logp.split([template_targets.shape[1], forget_targets.shape[1]], dim=1)
    template = _mean_term(terms.template, template_logp, template_targets, formulation, ignore_index)
    return template - _mean_term(terms.forget, forget_logp, forget_targets, formulation, ignore_index)


class FLATLoss(nn.Module):
    """`flat_loss` as a module. Unknown options raise, and reversed signs warn, when it is made."""

    def __init__(
        self,
        *,
        divergence: str = "total_variation",
        formulation: Formulation = "paper",
        ignore_index: int = -100,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        _terms(divergence, formulation)
        self.divergence = divergence
        self.formulation: Formulation = formulation
        self.ignore_index = ignore_index
        self.inplace_backward = inplace_backward

    def forward(
        self,
        template_logits: Tensor,  # [B, T, V]
        template_labels: Tensor,  # [B, T]
        forget_logits: Tensor,  # [B, T', V]
        forget_labels: Tensor,  # [B, T']
    ) -> Tensor:  # []
        terms = find_divergence(self.divergence, self.formulation)
        sides = template_logits, template_labels, forget_logits, forget_labels
        return _flat_loss(terms, *sides, self.formulation, self.ignore_index, self.inplace_backward)

    def extra_repr(self) -> str:
        options = ("divergence", "formulation", "ignore_index", "inplace_backward")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)


def _terms(divergence: str, formulation: Formulation) -> Divergence:
    """Looks the divergence up for a public function, and warns that function's caller about reversed signs."""
    terms = find_divergence(divergence, formulation)
    # A warning would break torch.compile's graph.
    if formulation == "official" and divergence in REVERSED and not torch.compiler.is_compiling():
        warnings.warn(
            f"formulation='official' reproduces the released signs of {divergence!r}, which {REVERSED[divergence]}; "
            "formulation='paper' has them corrected.",
            UserWarning,
            stacklevel=3,
        )
    return terms


def _flat_loss(
    terms: Divergence,
    template_logits: Tensor,
    template_labels: Tensor,
    forget_logits: Tensor,
    forget_labels: Tensor,
    formulation: Formulation,
    ignore_index: int,
    inplace_backward: bool,
) -> Tensor:
    _check("template_", "logits", template_logits, template_labels)
    _check("forget_", "logits", forget_logits, forget_labels)
    _check_same_questions("logits", template_logits, forget_logits)
    options = formulation, ignore_index, inplace_backward
    template = _logits_side(terms.template, template_logits, template_labels, *options)
    return template - _logits_side(terms.forget, forget_logits, forget_labels, *options)


def _logits_side(
    term: Callable[[Tensor], Tensor],
    logits: Tensor,
    labels: Tensor,
    formulation: Formulation,
    ignore_index: int,
    inplace_backward: bool,
) -> Tensor:
    targets = next_labels(labels, ignore_index)
    logp = token_logprobs(logits, targets, ignore_index=ignore_index, inplace_backward=inplace_backward)
    return _mean_term(term, logp, targets, formulation, ignore_index)


def _mean_term(
    term: Callable[[Tensor], Tensor],
    logp: Tensor,  # [B, T]
    targets: Tensor,  # [B, T]
    formulation: Formulation,
    ignore_index: int,
) -> Tensor:  # []
    """mean_b term(P_b), or term(P) in the official form; 0 for a P that no token entered."""
    labelled = targets != ignore_index
    p = logp.exp().masked_fill(~labelled, 0)
    if formulation == "paper":
        count = labelled.sum(1)
        answered = count > 0
        values = term(p.sum(1) / count.clamp(min=1))
    else:
        sequences, positions = p.shape
        answered = labelled.any()
        values = term(p.sum() / max(sequences * (positions - 1), 1))
    return values.masked_fill(~answered, 0).sum() / max(values.numel(), 1)


def _check(side: str, kind: str, values: Tensor, labels: Tensor) -> None:
    """Checks the `kind` ("logits" or "hidden") of one side ("template_", "forget_" or "") against its labels."""
    name = side + kind
    if values.dim() != 3:
        raise ValueError(
            f"{name} has shape {_checks.shape(values)}: it must be [B, T, {'V' if kind == 'logits' else 'H'}]"
        )
    _checks.floating(name, values)
    _checks.labels_of_rows(f"{side}labels", labels, name, values)


def _check_same_questions(kind: str, template: Tensor, forget: Tensor) -> None:
    if template.shape[0] != forget.shape[0]:
        raise ValueError(
            f"template_{kind} has B = {template.shape[0]} and forget_{kind} B = {forget.shape[0]}:"
            " both must answer the same B questions"
        )
