"""What operators return beyond one tensor: what a dampening did, and what is known of tokens."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class DampenCounts(NamedTuple):
    """Counts of one parameter, or of all."""

    elements: int
    selected: int
    non_finite: int  # elements whose forget or reference importance is NaN or infinite
    non_finite_selected: int  # selected elements whose parameter was NaN or infinite
    mean_factor: float  # mean dampening factor of the selected; NaN where nothing was selected

    @property
    def share(self) -> float:
        """Selected elements over all elements; 0 for an empty parameter."""
        return self.selected / self.elements if self.elements else 0.0


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells of each token, in natural units; see `token_statistics`."""

    logp: Tensor  # of the label
    lse: Tensor
    entropy: Tensor
    mean_logit: Tensor
    max_logit: Tensor
    hit: Tensor  # 1 where the label has the largest logit, else 0


@dataclass(frozen=True)
class DampenReport:
    """What `dampen_` did. The counts stay on the device until they are first read, so a report forces no sync.

    `names` are the dampened parameters (positions, as strings, for a list); `without_importance` those left unchanged
    because no importance was given for them; `tied` maps a repeated tensor's name to the name it was dampened under.
    """

    names: tuple[str, ...]
    elements: tuple[int, ...]
    stats: Tensor = field(repr=False)  # [P, 4] float64: selected, non_finite, non_finite_selected, sum of factors
    without_importance: tuple[str, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, DampenCounts]:
        """Name -> counts."""
        rows = self.stats.tolist()
        return {name: _counts(n, row) for name, n, row in zip(self.names, self.elements, rows, strict=True)}

    @property
    def total(self) -> DampenCounts:
        """The counts of all parameters together."""
        return _counts(sum(self.elements), self.stats.sum(0).tolist() if self.names else [0.0] * 4)

    def __str__(self) -> str:
        total = self.total
        text = f"dampened {total.selected:,} of {total.elements:,} values ({total.share:.3%})"
        if total.selected:
            text += f", mean factor {total.mean_factor:.4g}"
        if total.non_finite:
            text += f"; {total.non_finite:,} importances were not finite"
        if self.without_importance:
            text += f"; {len(self.without_importance)} parameters without importance are unchanged"
        return text


def _counts(elements: int, row: list[float]) -> DampenCounts:
    selected, non_finite, non_finite_selected, factors = row
    mean = factors / selected if selected else float("nan")
    return DampenCounts(elements, int(selected), int(non_finite), int(non_finite_selected), mean)
