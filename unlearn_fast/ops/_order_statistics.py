"""Exact order statistics of values that are never stored, in plain torch, on any device; csrc/cpu/order_statistics.h is
the same in C++, and explains it."""

import struct
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BINS = 1 << 16
PIECE = 1 << 24  # elements that are looked at together


class Keys:
    """64-bit integers in the order of the values that `values(*tensors)` makes of each tuple of tensors, and which of
    them count. They lie between -2^31 and 2^31 for float32, between -2^63 and 2^63 for float64."""

    def __init__(
        self, tensors: Sequence[tuple[Tensor, ...]], values: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> None:
        self._tensors, self._values, self.dtype = tensors, values, dtype
        self.bits = 64 if dtype == torch.float64 else 32

    def __iter__(self) -> Iterator[Tensor]:
        for group in self._tensors:
            for pieces in zip(*(t.flatten().split(PIECE) for t in group), strict=True):
                values, counted = self._values(*pieces)
                yield keys_of(values.to(self.dtype))[counted]

    def leading(self) -> Tensor:
        """How often each leading 16 bits occur."""
        return self.histogram([None])[0]

    def histogram(self, prefixes: Sequence[int | None], known: int = 0) -> list[Tensor]:
        """For each prefix of `known` bits, how often each next 16 bits occur; None: of all keys."""
        totals = [torch.zeros(BINS, dtype=torch.int64) for _ in prefixes]
        for keys in self:
            for total, prefix in zip(totals, prefixes, strict=True):
                own = keys if prefix is None else keys[keys >> (self.bits - known) == prefix]
                digits = (own >> (self.bits - known - 16)) % BINS if known else (own >> (self.bits - 16)) + BINS // 2
                total += torch.bincount(digits, minlength=BINS).cpu()
        return totals


def keys_of(values: Tensor) -> Tensor:
    """Order-preserving integers; NaN has no place among them."""
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = values.contiguous().view(integer)
    return torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits).to(torch.int64)


def value_of(key: int, dtype: torch.dtype) -> float:
    """What has this key."""
    integer, real = ("q", "d") if dtype == torch.float64 else ("i", "f")
    bits = key if key >= 0 else key ^ ((1 << 63) - 1 if dtype == torch.float64 else (1 << 31) - 1)
    return struct.unpack(real, struct.pack(integer, bits))[0]


def keys_at(keys: Keys, leading: Tensor, ranks: Sequence[int]) -> list[int]:
    """The keys at these ranks (from 0, the smallest), each below the number of those that count."""
    found = [_bin_of(leading, rank) for rank in ranks]
    prefixes, left = [bin_ - BINS // 2 for bin_, _ in found], [rest for _, rest in found]
    for known in range(16, keys.bits, 16):
        distinct = sorted(set(prefixes))
        histograms = dict(zip(distinct, keys.histogram(distinct, known), strict=True))
        found = [_bin_of(histograms[prefix], rank) for prefix, rank in zip(prefixes, left, strict=True)]
        prefixes = [prefix << 16 | bin_ for prefix, (bin_, _) in zip(prefixes, found, strict=True)]
        left = [rest for _, rest in found]
    return prefixes


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the value of that rank, and the rank among those of the bin."""
    sums = histogram.cumsum(0)
    bin_ = int(torch.searchsorted(sums, rank, right=True))
    return bin_, rank - (int(sums[bin_ - 1]) if bin_ else 0)
