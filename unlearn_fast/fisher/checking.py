"""Proves on a whole batch that gradients are attributed to the right examples.

With G_b what the fast pass takes for the gradient of example b, and random weights w_b, `sum_b w_b G_b` is compared
with the ordinary gradient of `sum_b w_b loss_b`. They agree for all w if and only if every G_b is the gradient of
loss_b; for random w, disagreement shows with probability 1. (The same idea verifies matrix products: Freivalds, 1977.)
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from unlearn_fast.fisher.expressions import Parts, weighted_sum
from unlearn_fast.fisher.gradients import wide

# How far the two sides may differ, relative to their norm, before the fast way is given up. A wrong attribution is off
# by about 1; rounding by far less than this. The second is for models that compute in 16 bits.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
NARROW_TOLERANCE = 5e-2
STRICTER = 0.1  # times all that, where any parameter's gradients are attributed wrongly
LAXER = 100.0  # times all that, where a disagreement ends the measurement
# A gradient that is mathematically zero (an attention key's bias) is rounding noise on both sides: so many ulps of the
# largest gradient are no disagreement; fewer where what arrives is so many times fainter than elsewhere.
NOISE_ULPS = 64
FAINT = 1e-3
# How far an example's loss in the batch may be from its loss alone, relative to it and at all: (share, floor).
SAME_LOSS = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-4, 3e-6)}
SAME_NARROW_LOSS = (5e-2, 2e-2)


class Comparison:
    """Of what a fast pass finds with ordinary gradients, parameter by parameter."""

    def __init__(self, weights: Tensor, gradients: Mapping[str, Tensor]) -> None:
        self.slack = 1.0  # factor of what may differ
        self.weights = weights  # [n, K]
        self.rest = dict(gradients)  # of the weighted losses, less what the fast pass has found of them
        self.sizes = {name: float(g.norm()) for name, g in gradients.items()}
        self.largest = max((size for size in self.sizes.values() if math.isfinite(size)), default=0.0)
        self.narrow = False  # whether anything was computed in 16 bits
        self.arrived: dict[str, float] = {}  # norm of the loss gradients that theirs are made of, where any were seen

    def subtract(self, name: str, param: Tensor, parts: Parts, k: int) -> None:
        """What the backward of the losses [:, k] has found."""
        ours = weighted_sum(param, self.weights[:, k].to(param.device, wide(param)), parts)
        self.rest[name] = self.rest[name].to(ours.dtype).sub_(ours) if name in self.rest else ours.neg_()
        strengths = (float(t.detach().float().norm()) for _, gradient in parts for t in gradient.sources())
        self.arrived[name] = max(strengths, default=0.0) + self.arrived.get(name, 0.0)

    def disagreeing(self) -> list[str]:
        """Parameters whose gradients are attributed wrongly, or used where the fast pass sees nothing.

        Where one is, a faint disagreement of another may have the same cause, such as a loss of the whole batch.
        """
        wrong = any(not self._agrees(name, rest) for name, rest in self.rest.items() if name in self.arrived)
        if wrong and self.slack <= 1:
            self.slack = STRICTER
        return [name for name, rest in self.rest.items() if not self._agrees(name, rest)]

    def proved(self) -> set[str]:
        """Parameters whose gradients agree and are not zero, which would prove nothing."""
        return {
            name for name, size in self.sizes.items() if 0 < size < math.inf and self._agrees(name, self.rest[name])
        }

    def _agrees(self, name: str, rest: Tensor) -> bool:
        size = self.sizes.get(name, 0.0)
        if not math.isfinite(size):
            return True  # undecided
        if name not in self.arrived:
            return size == 0
        tolerance = NARROW_TOLERANCE if self.narrow else TOLERANCE[rest.dtype]
        strongest = max(self.arrived.values())
        faintness = min(1.0, self.arrived[name] / (FAINT * strongest)) if strongest > 0 else 1.0
        noise = NOISE_ULPS * torch.finfo(rest.dtype).eps * self.largest * faintness
        return float(rest.norm()) <= self.slack * (tolerance * size + noise)


def same_losses(together: Tensor, alone: Tensor, *, narrow: bool) -> bool:
    """Whether examples have the losses that they have alone; NaN is NaN."""
    share, floor = SAME_NARROW_LOSS if narrow else SAME_LOSS.get(together.dtype, SAME_NARROW_LOSS)
    return torch.allclose(together, alone, share, floor, equal_nan=True)


def random_weights(n: int, K: int) -> Tensor:  # [n, K]
    """Between 0.5 and 1.5 in size, of either sign; always the same, so that runs repeat."""
    generator = torch.Generator().manual_seed(n)
    return (torch.rand(n, K, generator=generator) + 0.5) * (1 - 2 * torch.randint(2, (n, K), generator=generator))
