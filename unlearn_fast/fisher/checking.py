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

# How far the two sides may differ, relative to their norm, before the fast way is given up. A wrong
# attribution is off by about 1; rounding by far less than this.
TOLERANCE, NARROW_TOLERANCE = 1e-4, 5e-2  # the second where anything is computed in 16 bits
# A gradient that is mathematically zero (an attention key's bias) is rounding noise on both sides: so many ulps of the
# largest gradient are no disagreement.
NOISE_ULPS = 64


class Comparison:
    """Of what a fast pass finds with ordinary gradients, parameter by parameter."""

    def __init__(self, losses: Tensor, weights: Tensor, gradients: Mapping[str, Tensor], *, narrow: bool) -> None:
        self.losses, self.weights = losses, weights
        self.gradients = dict(gradients)  # of the weighted losses; each is forgotten once it has been compared
        self.tolerance = NARROW_TOLERANCE if narrow else TOLERANCE
        largest = max((float(g.norm()) for g in gradients.values()), default=0.0)
        self.noise = NOISE_ULPS * torch.finfo(torch.float32).eps * largest if math.isfinite(largest) else 0.0

    def same_losses(self, losses: Tensor) -> bool:
        """Whether the losses are those that the same examples have in a larger batch."""
        share = 10 * self.tolerance
        return torch.allclose(self.losses, losses[: len(self.losses)].detach(), share, share, equal_nan=True)

    def agrees(self, name: str, param: Tensor, parts: Parts) -> bool:
        ours = weighted_sum(param, self.weights.to(param.device, wide(param)), parts)
        theirs = self.gradients.pop(name, None)
        theirs = torch.zeros_like(ours) if theirs is None else theirs.to(ours.dtype)
        size = float(theirs.norm())
        if float((ours - theirs).norm()) <= self.tolerance * size + self.noise:
            return True
        # Gradients that are not finite are compared by where they are.
        return not math.isfinite(size) and torch.equal(ours.isfinite(), theirs.isfinite())

    def unseen(self) -> list[str]:
        """Parameters with a gradient that the fast pass has not come by."""
        return [name for name, gradient in self.gradients.items() if not float(gradient.norm()) <= self.noise]


def random_weights(n: int) -> Tensor:
    """Between 0.5 and 1.5 in size, of either sign; always the same, so that runs repeat."""
    generator = torch.Generator().manual_seed(n)
    return (torch.rand(n, generator=generator) + 0.5) * (1 - 2 * torch.randint(2, (n,), generator=generator))
