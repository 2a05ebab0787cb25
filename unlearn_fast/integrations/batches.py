"""Examples of different lengths as padded batches."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from unlearn_fast.integrations.rows import IGNORED, Example

STEPS = 4  # lengths from each power of two to the next


class Batches:
    """Mappings of input_ids, attention_mask and labels, padded on the right.

    Importances are exact per example, so that the order is free: examples of one length come together, which leaves
    little padding, and the longest first, so that too little memory shows at once. Lengths are rounded up, because
    models that flatten their sequences are checked again at every new one.
    """

    def __init__(self, examples: Sequence[Example], size: int, pad: int) -> None:
        self.dataset = sorted(examples, key=lambda example: -len(example.ids))
        self.size, self.pad, self.longest = size, pad, len(self.dataset[0].ids)

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.dataset), self.size):
            ids, targets, _ = zip(*self.dataset[start : start + self.size], strict=True)
            length = min(_rounded(len(ids[0])), self.longest)  # which fits into the model
            labels = _padded(targets, length, IGNORED) if targets[0].dim() else torch.stack(targets).long()
            mask = _padded([torch.ones_like(row) for row in ids], length, 0)
            yield {"input_ids": _padded(ids, length, self.pad), "attention_mask": mask, "labels": labels}


def unused_ending(examples: Sequence[Example], vocabulary: int) -> int:
    """A token that no example ends with: models that look for the last token before the padding find the right one."""
    endings = {int(example.ids[-1]) for example in examples}
    return next((token for token in range(vocabulary) if token not in endings), 0)


def _rounded(length: int) -> int:
    """At most a quarter more, and less than an eighth on average."""
    step = max(1, 2 ** (length.bit_length() - 1) // STEPS)
    return -(-length // step) * step


def _padded(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value).long()
    return nn.functional.pad(padded, (0, length - padded.shape[1]), value=value)
