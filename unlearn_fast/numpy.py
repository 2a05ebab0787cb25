"""The numpy door: dampening of numpy arrays, memory-mapped ones included, by the same kernel, with no torch tensor."""

import numpy as np
from numpy.typing import NDArray

from unlearn_fast import _library
from unlearn_fast._report import DampenCounts
from unlearn_fast.ops._checks import may_overlap
from unlearn_fast.ops.dampen import check_settings

_PARAMETERS = (np.float16, np.float32, np.float64)


def dampen_(
    p: NDArray,
    f: NDArray,
    r: NDArray,
    *,
    alpha: float,
    lam: float = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    floor: float = 0.0,
) -> DampenCounts:
    """Selective synaptic dampening of an array in place: `p *= min((lam * r / f)^exponent, cap)` where `f > alpha * r`.

    Args:
        p: the parameter: float16, float32 or float64, writable; changed in place.
        f, r: importance to the forget set and to the reference set, shaped like `p`, of a floating dtype.
        alpha, lam, exponent, cap, floor: as in `unlearn_fast.dampen_`, which also states the formula and its source.

    Returns:
        The counts: elements, selected, non-finite importances, non-finite selected parameters, mean factor.

    Raises:
        TypeError, ValueError: an argument does not fit; `p` is then unchanged.
        RuntimeError: the compiled part is missing (`unlearn_fast info` tells why).
    """
    check_settings(alpha, lam, exponent, cap, floor)
    for name, array in (("p", p), ("f", f), ("r", r)):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} is a {type(array).__name__}: it must be a numpy array")
        if array.dtype.type not in _PARAMETERS or not array.dtype.isnative:
            raise TypeError(f"{name} has dtype {array.dtype}: it must be float16, float32 or float64, in native order")
        if array.shape != p.shape:
            raise ValueError(f"{name} has shape {array.shape}: it must have that of p, {p.shape}")
    if not p.flags.writeable:
        raise ValueError("p is read-only: open a memory map with mode 'r+', or pass a writable copy")
    if may_overlap(p.shape, p.strides, p.itemsize):
        raise ValueError("p has overlapping (broadcast, or sliding) or reversed memory: give it memory of its own")
    if _library.native is None:
        raise RuntimeError(f"the numpy door needs the compiled part: {_library.missing['native']}")
    order = sorted(range(p.ndim), key=lambda axis: -p.strides[axis])  # contiguous where p is, in any axis order
    target, *importances = (_addressable(a.transpose(order)) for a in (p, f, r))
    selected, non_finite, non_finite_selected, factors = _library.native.dampen(
        target, *importances, alpha, lam, exponent, cap, floor
    )
    if not np.shares_memory(target, p):
        p.transpose(order)[...] = target
    return DampenCounts(
        p.size, selected, non_finite, non_finite_selected, factors / selected if selected else float("nan")
    )


def _addressable(array: NDArray) -> NDArray:
    """The array itself, or a copy where its elements are not whole elements apart: the field of a structured array."""
    fits = array.flags.aligned and all(stride % array.itemsize == 0 for stride in array.strides)
    return array if fits else np.ascontiguousarray(array)
