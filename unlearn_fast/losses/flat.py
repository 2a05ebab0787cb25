"""FLAT: unlearning from forget data only, by adjusting the loss between a template answer and the forget answer.

Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", ICLR 2025 (arXiv 2410.11143). Released code:
UCSC-REAL/FLAT, `dataloader.py`, loss type `cl`.

The vocabulary-sized work is done by `token_logprobs`, and by the engine of losses/linear.py; the rest is plain torch on
[B, T].
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from unlearn_fast.losses.divergences import REVERSED, Divergence, Formulation, find_divergence
from unlearn_fast.losses.forms import LinearOptions, LogitsOptions, Sides, check_sides, mean, plan
from unlearn_fast.losses.linear import Unit, mean_of_sequences
from unlearn_fast.losses.values import per_token
from unlearn_fast.losses.vocabulary import VocabularyShard
from unlearn_fast.ops._rows import next_labels


def flat_loss(
    template_logits: Tensor,  # [B, T, V]
    template_labels: Tensor,  # [B, T]
    forget_logits: Tensor,  # [B, T', V]
    forget_labels: Tensor,  # [B, T']
    *,
    divergence: str = "total_variation",
    formulation: Formulation = "paper",
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
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
        softcap, temperature: see `LogitsOptions`.
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
    options = LogitsOptions(ignore_index, softcap, temperature, inplace_backward)
    sides = {"template_": (template_logits, template_labels), "forget_": (forget_logits, forget_labels)}
    return _flat_loss(terms, sides, formulation, options)


def flat_template_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    divergence: str = "total_variation",
    formulation: Formulation = "paper",
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:  # []
    """The template side of `flat_loss` alone, A(e).

    `flat_template_loss(...) + flat_forget_loss(...)` is exactly `flat_loss(...)`, in value and gradient: with forward
    and backward one side at a time, only one side's activations live at once.
    """
    terms = _terms(divergence, formulation)
    check_sides("logits", {"": (logits, labels)})
    options = LogitsOptions(ignore_index, softcap, temperature, inplace_backward)
    return _logits_side(terms.template, logits, labels, formulation, options)


def flat_forget_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    divergence: str = "total_variation",
    formulation: Formulation = "paper",
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:  # []
    """The forget side of `flat_loss` alone, -C(f); see `flat_template_loss`."""
    terms = _terms(divergence, formulation)
    check_sides("logits", {"": (logits, labels)})
    options = LogitsOptions(ignore_index, softcap, temperature, inplace_backward)
    return -_logits_side(terms.forget, logits, labels, formulation, options)


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
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:  # []
    """`flat_loss` of the logits hidden @ weight.T + bias, without ever storing them.

    Neither the [B, T, V] logits nor their gradient are allocated, only chunks of at most about `chunk_bytes`; the
    contract is that of `linear_gradient_ascent_loss`, the last options those of `LinearOptions`. The released
    formulation knows each side's factor at the end only, and takes one more tensor of the weight's size for it.
    Otherwise the arguments, the result and the errors of `flat_loss`.
    """
    terms = _terms(divergence, formulation)
    options = LinearOptions(bias, ignore_index, softcap, temperature, chunk_bytes, weight_grad_dtype, shard)
    sides = {"template_": (template_hidden, template_labels), "forget_": (forget_hidden, forget_labels)}
    planned = plan(partial(_pair_values, terms), sides, weight, {}, options, Unit.SEQUENCE)
    if formulation == "paper":
        return mean_of_sequences(*planned)
    losses = []
    for term, (prefix, (hidden, labels)) in zip(terms, sides.items(), strict=True):
        share = partial(_summed_share, positions=labels.shape[1] - 1)
        p = mean_of_sequences(*plan(share, {prefix: (hidden, labels)}, weight, {}, options, Unit.ROW))
        labelled = (labels[:, 1:] != ignore_index).any()
        losses.append(term(p).masked_fill(~labelled, 0))
    return losses[0] - losses[1]


class FLATLoss(nn.Module):
    """`flat_loss` as a module. Unknown options raise, and reversed signs warn, when it is made."""

    def __init__(
        self,
        *,
        divergence: str = "total_variation",
        formulation: Formulation = "paper",
        ignore_index: int = -100,
        softcap: float | None = None,
        temperature: float = 1.0,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        _terms(divergence, formulation)
        self.divergence = divergence
        self.formulation: Formulation = formulation
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.temperature = temperature
        self.inplace_backward = inplace_backward

    def forward(
        self,
        template_logits: Tensor,  # [B, T, V]
        template_labels: Tensor,  # [B, T]
        forget_logits: Tensor,  # [B, T', V]
        forget_labels: Tensor,  # [B, T']
    ) -> Tensor:  # []
        terms = find_divergence(self.divergence, self.formulation)
        sides = {"template_": (template_logits, template_labels), "forget_": (forget_logits, forget_labels)}
        options = LogitsOptions(self.ignore_index, self.softcap, self.temperature, self.inplace_backward)
        return _flat_loss(terms, sides, self.formulation, options)

    def extra_repr(self) -> str:
        options = ("divergence", "formulation", "ignore_index", "softcap", "temperature", "inplace_backward")
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


def _flat_loss(terms: Divergence, sides: Sides, formulation: Formulation, options: LogitsOptions) -> Tensor:
    check_sides("logits", sides)
    template, forget = (
        _logits_side(term, *side, formulation, options) for term, side in zip(terms, sides.values(), strict=True)
    )
    return template - forget


def _logits_side(
    term: Callable[[Tensor], Tensor], logits: Tensor, labels: Tensor, formulation: Formulation, options: LogitsOptions
) -> Tensor:  # []
    targets = next_labels(labels, options.ignore_index)
    logp = options.logprobs(logits, targets)
    labelled = targets != options.ignore_index
    if formulation == "paper":
        return mean(_side_values(term, logp, labelled))
    p = mean(_summed_share(logp, labelled, positions=labels.shape[1] - 1))
    return term(p).masked_fill(~labelled.any(), 0)


def _pair_values(
    terms: Divergence, template: Tensor, template_labelled: Tensor, forget: Tensor, forget_labelled: Tensor
) -> Tensor:  # [B]
    """The paper's loss, A(e_b) - C(f_b)."""
    return _side_values(terms.template, template, template_labelled) - _side_values(
        terms.forget, forget, forget_labelled
    )


def _side_values(term: Callable[[Tensor], Tensor], logp: Tensor, labelled: Tensor) -> Tensor:  # [B, T] -> [B]
    """term(P_b), the mean of p over the labelled tokens; 0 for a P that no token entered."""
    return term(per_token(logp.exp(), labelled)).masked_fill(~labelled.any(1), 0)


def _summed_share(logp: Tensor, labelled: Tensor, *, positions: int) -> Tensor:  # [B, T] -> [B]
    """What a sequence adds to the released P, a mean over all positions."""
    return logp.exp().masked_fill(~labelled, 0).sum(1) / max(positions, 1)
