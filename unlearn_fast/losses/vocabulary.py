"""A vocabulary that is split over the ranks of a process group: each holds some rows of the weight, all hold the rest.

Every rank calls the loss with the same hidden states and labels and gets the same loss, the whole gradient of the
hidden states, and that of its own rows of the weight. A chunk of logits costs two all-reduces of [2, n] and [n] numbers
(maximum and the label's logit; sums), the gradient of the hidden states one more at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_fast.losses.rows import LabelRows
from unlearn_fast.ops._rows import scaled


class VocabularyShard(NamedTuple):
    """This rank's part of the vocabulary: the weight (and bias) of the tokens from `start` on, as many as it has rows.

    The parts of all ranks together are the tokens 0 to `size` - 1, each once.
    """

    group: "dist.ProcessGroup"
    start: int
    size: int

    def check(self, weight: Tensor, targets: Sequence[Tensor], ignore_index: int) -> None:
        if self.start < 0 or len(weight) == 0 or self.start + len(weight) > self.size:
            raise ValueError(
                f"shard has start {self.start} and size {self.size}, and weight has {len(weight)} rows:"
                " the rows must be tokens of 0 to size - 1, at least one"
            )
        for labels in targets:  # a label that no rank holds would pass for one of probability 0
            bad = ((labels < 0) | (labels >= self.size)) & (labels != ignore_index)
            if labels.device.type == "cpu" and bad.any():
                raise RuntimeError(f"labels holds {labels[bad][0].item()}: it must be in [0, {self.size})")

    @property
    def rows(self) -> int:
        """Tokens a rank, by which all ranks agree on the size of chunks."""
        return -(-self.size // dist.get_world_size(self.group))

    def sum_(self, x: Tensor) -> None:
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)


class ShardedRows(NamedTuple):
    """The label's log-probability, from this rank's columns of the logits and the other ranks' sums."""

    whole: LabelRows
    shard: VocabularyShard

    def forward(self, labels: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
        """log p; then this rank's labels, and the log p, row_max and log_sum from which its columns get gradients."""
        (x,) = logits
        ignore_index, softcap, temperature = self.whole
        local = labels.long() - self.shard.start
        ignored = labels == ignore_index
        owned = (local >= 0) & (local < x.shape[1]) & ~ignored
        # Rows of other ranks' labels need the sums too: they borrow the first column as their label.
        local = local.masked_fill(~owned, 0).masked_fill(ignored, -1)
        rows = LabelRows(-1, softcap, temperature)
        own = x.gather(1, local.clamp(min=0).unsqueeze(1)).squeeze(1)
        logp, row_max, log_sum = rows.forward(local, x)
        z = scaled(own.to(logp.dtype), softcap, temperature)  # of the label, or of the borrowed one

        highest = torch.stack([row_max, z.masked_fill(~owned, -torch.inf)])
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.shard.group)
        maximum, label = highest.unbind()
        # The label's own term is kept out of the sum, so that log p keeps its digits as p tends to 1.
        others = (row_max - maximum + log_sum).exp() * torch.where(owned, -logp.expm1(), 1)
        self.shard.sum_(others)
        own = label - maximum
        logp = -torch.logaddexp(others.log() - own, torch.zeros_like(own))
        log_sum = torch.logaddexp(others.log(), own)
        # The gradient of the label's column is grad * -expm1(log p) by definition. That of a borrowed one is that of
        # any other column, -grad * p_j: so it is given as log(1 + p_j).
        borrowed = (z - maximum - log_sum).exp().log1p()
        value = logp.masked_fill(ignored, 0)
        return value, local, torch.where(owned, logp, borrowed), maximum, log_sum

    def backward_(self, grad: Tensor, labels: Tensor, saved: tuple[Tensor, ...], *logits: Tensor) -> None:
        _, local, *of_columns = saved
        LabelRows(-1, *self.whole[1:]).backward_(grad, local, tuple(of_columns), *logits)
