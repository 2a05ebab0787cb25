"""What one alpha selects, gathered: to dampen it with many lams then costs what is selected, not what there is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_fast.ops.dampen.align import Entry
from unlearn_fast.ops.dampen.undo import record, restore_
from unlearn_fast.reference.dampen import RUN


class Selected:
    """The elements with f > alpha * r of parameters on one device: where they are, their values and importances.

    It reads all importances once. Memory: an undo record, and both importances of what is selected.
    """

    def __init__(self, entries: Sequence[Entry], alpha: float) -> None:
        self._alpha = float(alpha)
        self._params = [entry.param for entry in entries]
        self._counts, self._offsets, self._values = record(entries, [self._alpha] * len(entries))
        self._gathered = self._gather(entries)

    def dampen_(self, lam: float, exponent: float, cap: float, floor: float) -> Tensor:  # [parts, 4]
        """Dampens, with the bits of `dampen_`; returns counts whose sums over the parts are those of `dampen_`, but for
        what is not selected."""
        old, forget, reference = self._gathered
        new = [values.clone() for values in old]
        settings = [self._alpha] * len(new), [float(lam)] * len(new), float(exponent), float(cap), float(floor)
        table = torch.ops.unlearn_fast.dampen_(new, forget, reference, *settings)
        self._write(torch.cat([self._values[:0], *(values.view(torch.uint8) for values in new)]))
        return table

    def restore_(self) -> None:
        """Puts the values back that were there at first."""
        self._write(self._values)

    def _write(self, values: Tensor) -> None:
        if len(values):
            restore_(self._params, (self._counts, self._offsets, values))

    def _gather(self, entries: Sequence[Entry]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of every parameter in which something is selected: values and importances, with one axis."""
        gathered: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        per_run = self._counts.tolist()  # once: on a GPU every look waits for it
        run = offset = byte = 0
        for entry in entries:
            param, runs = entry.param, -(-entry.param.numel() // RUN)
            counts, n = self._counts[run : run + runs], sum(per_run[run : run + runs])
            run += runs
            if n == 0:
                continue
            starts = torch.arange(0, runs * RUN, RUN, device=param.device).repeat_interleave(counts, output_size=n)
            index = starts + self._offsets[offset : offset + n].to(torch.int64)
            end = byte + n * param.element_size()
            values = self._values[byte:end].clone().view(param.dtype)  # a copy begins where its dtype may
            offset, byte = offset + n, end
            for side, tensor in zip(
                gathered, (values, entry.forget.take(index), entry.reference.take(index)), strict=True
            ):
                side.append(tensor)
        return gathered
