"""The eight divergences of FLAT: what each minimises as a function of the two answers' mean probabilities.

Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", ICLR 2025 (arXiv 2410.11143). With the
variational function g* and the conjugate f* of a divergence, FLAT minimises -g*(e) + f*(g*(f)): e is the probability of
the template answer, f that of the forget answer. The two answers never meet in one term, so a divergence is a pair of
functions of one number each: loss = A(e) - C(f).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Formulation = Literal["paper", "official"]


class Divergence(NamedTuple):
    """loss = template(e) - forget(f), elementwise over probabilities of any shape."""

    template: Callable[[Tensor], Tensor]  # A
    forget: Callable[[Tensor], Tensor]  # C


def _sqrt_rest(f: Tensor) -> Tensor:
    """sqrt(1 - f), whose derivative is taken as 0 where f has rounded to 1.

    The derivative in f is infinite there, but f depends on the logits through a softmax, and the derivative in the
    logits, of order sqrt(1 - f), vanishes. Passing infinity on would turn that 0 into NaN.
    """
    full = f >= 1
    return (1 - f.masked_fill(full, 0)).sqrt().masked_fill(full, 0)


# A(0) = C(0) = 0 wherever loss(0, 0) = 0, that is for all but kl, whose constant exp(-1) belongs to the forget term.
# expm1 and log1p keep the small probabilities of long answers, which 1 + f would round away.
PAPER: dict[str, Divergence] = {
    # name: (A, C)
    "kl": Divergence(lambda e: -e, lambda f: -(f - 1).exp()),
    "jeffrey": Divergence(lambda e: -e, lambda f: -f * (1 + f / 4 * (1 + f / 4))),
    "pearson": Divergence(lambda e: -e, lambda f: -f * (1 + f / 4)),
    "jensen_shannon": Divergence(lambda e: ((-e).expm1() / 2).log1p(), lambda f: -(f.expm1() / 2).log1p()),
    "total_variation": Divergence(lambda e: -e.tanh() / 2, lambda f: -f.tanh() / 2),
    "reverse_kl": Divergence(lambda e: (-e).expm1(), lambda f: -f),
    "squared_hellinger": Divergence(lambda e: (-e).expm1(), lambda f: -f.expm1()),
    "neyman": Divergence(lambda e: (-e).expm1(), lambda f: 2 * (-f / 2).expm1()),
}
"""The published divergences. The signs of the last three are corrected: they raise e and lower f, as the others do."""

OFFICIAL: dict[str, Divergence] = PAPER | {
    "reverse_kl": Divergence(lambda e: e.expm1(), lambda f: f),
    "squared_hellinger": Divergence(lambda e: e.expm1(), lambda f: -(-f).expm1()),
    "neyman": Divergence(lambda e: e.expm1(), lambda f: 2 * _sqrt_rest(f) - 2),
}
"""The divergences of the released code (UCSC-REAL/FLAT, `dataloader.py`), with its signs."""

REVERSED: dict[str, str] = {
    "reverse_kl": "push the template probability down and the forget probability up",
    "squared_hellinger": "push the template probability down and the forget probability up",
    "neyman": "push the template probability down",
}
"""Divergence -> what its released signs do that unlearning does not want."""


def find_divergence(divergence: str, formulation: str) -> Divergence:
    """The terms of a divergence; ValueError, with the choices, for an unknown name."""
    if formulation not in get_args(Formulation):
        raise ValueError(f"formulation must be one of {', '.join(get_args(Formulation))}; got {formulation!r}")
    if divergence not in PAPER:
        raise ValueError(f"divergence must be one of {', '.join(PAPER)}; got {divergence!r}")
    return (PAPER if formulation == "paper" else OFFICIAL)[divergence]
