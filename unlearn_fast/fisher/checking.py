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
# by about 1; rounding by far less than this. The second is for parameters whose gradients come in 16 bits.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
NARROW_TOLERANCE = 5e-2
# A gradient that is mathematically zero (an attention key's bias) is rounding noise on both sides: so many ulps of the
# largest gradient are no disagreement.
NOISE_ULPS = 64


class Comparison:
    """Of what a fast pass finds with ordinary gradients, parameter by parameter."""

    def __init__(self, weights: Tensor, gradients: Mapping[str, Tensor]) -> None:
        self.weights = weights  # [n, K]
        self.rest = dict(gradients)  # of the weighted losses, less what the fast pass has found of them
        self.sizes = {name: float(g.norm()) for name, g in gradients.items()}
        self.largest = max((size for size in self.sizes.values() if math.isfinite(size)), default=0.0)
        self.narrow: set[str] = set()  # parameters whose gradients come in 16 bits
        self.seen: set[str] = set()

    def subtract(self, name: str, param: Tensor, parts: Parts, k: int) -> None:
        """What the backward of the losses [:, k] has found."""
        ours = weighted_sum(param, self.weights[:, k].to(param.device, wide(param)), parts)
        self.rest[name] = self.rest[name].to(ours.dtype).sub_(ours) if name in self.rest else ours.neg_()
        self.seen.add(name)

    def disagreeing(self) -> list[str]:
        """Parameters whose gradients are attributed wrongly, or used where the fast pass sees nothing."""
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
        if name not in self.seen:
            return size == 0
        tolerance = NARROW_TOLERANCE if name in self.narrow else TOLERANCE[rest.dtype]
        noise = NOISE_ULPS * torch.finfo(rest.dtype).eps * self.largest
        return float(rest.norm()) <= tolerance * size + noise


def random_weights(n: int, K: int) -> Tensor:  # [n, K]
    """Between 0.5 and 1.5 in size, of either sign; always the same, so that runs repeat."""
    generator = torch.Generator().manual_seed(n)
    return (torch.rand(n, K, generator=generator) + 0.5) * (1 - 2 * torch.randint(2, (n, K), generator=generator))
