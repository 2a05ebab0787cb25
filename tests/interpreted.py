"""Runs Triton kernels in Triton's interpreter, on the CPU. Import before anything that imports triton.

`TRITON_INTERPRET` must be set before triton is imported, and ahead-of-time compilation needs it unset: files that
import this module run in a process of their own, started by test_triton.py.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle, _convert_float

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# weights, first, absolute
MOMENTS = [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (True, True, True)]

_dot = InterpreterBuilder.create_dot


def _dot_of_bfloat16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter keeps bfloat16 as its bits, and would multiply those."""

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)

    return _dot(self, widen(a), widen(b), *rest)


InterpreterBuilder.create_dot = _dot_of_bfloat16


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """The interpreter rounds between product and sum."""
    wide = [v.data.astype(np.float64) for v in (x, y, z)]
    return TensorHandle((wide[0] * wide[1] + wide[2]).astype(z.data.dtype), z.dtype.scalar)


InterpreterBuilder.create_fma = _fma

_reduce = ReduceOps.apply_impl


def _reduce_to_larger(self: Any, input: Any) -> Any:
    """The interpreter would compare one pair of elements after the other."""
    if getattr(self.combine_fn, "__name__", "") == "larger":
        return self.min_max(input[0], val_reduce_op=np.max)
    return _reduce(self, input)


ReduceOps.apply_impl = _reduce_to_larger


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rounding(dtype: torch.dtype) -> float:
    """What a result of 16 bits may lose beyond half an ulp: the interpreter rounds towards zero."""
    return torch.finfo(dtype).eps / 4 if dtype.itemsize == 2 else 0.0


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sums(shape: tuple[int, ...], B: int, dtype: torch.dtype, weights: bool, first: bool) -> list[Tensor | None]:
    """out, weights and first to start from."""
    weights_b = randn(2 * B, dtype=wide(dtype), seed=1)[::2] if weights else None
    return [
        randn(*shape, dtype=wide(dtype), seed=2).abs(),
        weights_b,
        randn(*shape, dtype=wide(dtype), seed=3) if first else None,
    ]


def assert_moments(
    out: Tensor, first: Tensor | None, before: list[Tensor | None], gradients: Tensor, sizes: Tensor, absolute: bool,
    scale: float,
) -> None:  # fmt: skip
    """Compares with the definition, from per-example gradients in float64, [B, *out.shape].

    sizes: the same gradients from the factors' magnitudes; errors are relative to what those would add, since the terms
    of a gradient may cancel.
    """
    start, weights, start_first = (None if x is None else x.double() for x in before)
    w = torch.ones(len(gradients), dtype=torch.float64) if weights is None else weights
    w = scale * w.reshape(-1, *[1] * out.dim())
    square = torch.abs if absolute else torch.square
    _assert_near(out, start + (w * square(gradients)).sum(0), start + (w * square(sizes)).abs().sum(0))
    if first is not None:
        _assert_near(first, start_first + (w * gradients).sum(0), start_first.abs() + (w * sizes).abs().sum(0))


def _assert_near(result: Tensor, exact: Tensor, size: Tensor) -> None:
    assert result.shape == exact.shape
    error = ((result.double() - exact).abs() / size.clamp(min=torch.finfo(result.dtype).tiny)).nan_to_num(torch.inf)
    tolerance = 16 * torch.finfo(result.dtype).eps
    assert error.max() <= tolerance, f"relative error {error.max():.3g}, tolerance {tolerance:.3g}"
