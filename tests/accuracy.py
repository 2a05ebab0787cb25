"""How near is near enough: our error from float64 beside torch's own error in the same dtype.

A computation runs three times: with our operator, with the reference formula in the same dtype, which shows torch's own
accuracy, and with the reference formula on the same inputs in float64, which is the truth.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

import unlearn_fast
from unlearn_fast import reference

# tolerance = MARGIN * max(torch's worst error, floor) + half an ulp of the result's dtype;
# the floor is FLOOR ulps of the computing dtype where a test states no other.
MARGIN = 2.0  # two equally accurate computations round differently: whose worst error is the larger one is luck
FLOOR = 4.0  # torch may be exact by luck, while exp, sum, log and product may each cost an ulp

Run = Callable[[Any, list[Tensor]], list[Tensor]]


def assert_as_accurate(
    run: Run,
    inputs: list[Tensor],
    dtype: torch.dtype,
    *,
    truth: Callable[[list[Tensor]], list[Tensor]] | None = None,
    beyond_torch: Collection[int] = (),
    scales: Callable[[list[Tensor]], list[Tensor]] | None = None,
    floor: float | None = None,
) -> None:
    """Compares the results of `run(library, inputs)` for our library and for the references.

    `inputs` are in `dtype`, integers apart; a run keeps their strides and must not change them.

    truth: gives the exact results for float64 inputs where the reference formula in float64 does not.
    beyond_torch: indices of results that torch may lose, where only the floor counts.
    scales: gives what each result's errors are relative to, for float64 inputs: for sums whose terms may cancel, the
        sum of the terms' magnitudes.
    floor: instead of FLOOR ulps.
    """
    before = [x.clone() for x in inputs]
    ours = run(unlearn_fast, inputs)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(before, inputs, strict=True)), "an input was changed"
    wide = [_to(x, torch.float64) for x in inputs]
    exact = (truth or functools.partial(run, reference))(wide)
    sizes = scales(wide) if scales else [x.abs() for x in exact]
    if truth or dtype != torch.float64:
        torchs = _worst(run(reference, inputs), exact, sizes)
    else:  # nothing is wider than float64: torch's errors in float32, in float64's ulps
        narrow = [_to(x, torch.float32) for x in inputs]
        finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        rounded = run(reference, [_to(x, torch.float64) for x in narrow])
        torchs = [error * finer for error in _worst(run(reference, narrow), rounded, sizes)]
    floor = floor or FLOOR * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for index, (result, wanted, own, size) in enumerate(zip(ours, exact, torchs, sizes, strict=True)):
        allowed = 0.0 if index in beyond_torch else own
        assert_accurate(result, wanted, torchs=allowed, size=size, floor=floor, what=f"result {index}")


def assert_accurate(
    result: Tensor,
    exact: Tensor,
    *,
    torchs: float = 0.0,
    size: Tensor | None = None,
    floor: float | None = None,
    what: str = "the result",
) -> None:
    """Compares one result with the truth, allowing `torchs`, torch's worst relative error."""
    assert result.shape == exact.shape
    floor = floor or FLOOR * torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps
    tolerance = MARGIN * max(torchs, floor) + torch.finfo(result.dtype).eps / 2
    errors = relative_errors(result, exact, exact.abs() if size is None else size)
    worst = errors.max().item() if errors.numel() else 0.0
    assert worst <= tolerance, f"{what}: relative error {worst:.3g}, torch's {torchs:.3g}, tolerance {tolerance:.3g}"


def relative_errors(result: Tensor, exact: Tensor, size: Tensor) -> Tensor:
    """Per element. The same NaN, the same infinity, and the truth rounded to the result's dtype count as no error."""
    rounded = exact.to(result.dtype)
    same = (result == rounded) | (result.isnan() & rounded.isnan())
    size = size.clamp(min=torch.finfo(result.dtype).tiny)
    return ((result.double() - exact).abs() / size).nan_to_num(nan=torch.inf).masked_fill(same, 0)


def bits(x: Tensor) -> Tensor:
    """The elements' bits as integers: equal for equal NaN, different for 0 and -0."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(width)


def leaf(x: Tensor) -> Tensor:
    """A copy with the same strides that requires grad."""
    return x.detach().clone().requires_grad_()


def _worst(results: list[Tensor], exact: list[Tensor], sizes: list[Tensor]) -> list[float]:
    """Each result's largest error; where torch gives NaN or an infinity instead, no error is excused by it."""
    errors = [relative_errors(*triple) for triple in zip(results, exact, sizes, strict=True)]
    return [e[e.isfinite()].max().item() if e.isfinite().any() else 0.0 for e in errors]


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True) if x.is_floating_point() else x.clone()
