"""Checks every operator on this machine: values and gradients against the references in float64.

A scenario runs three times: with our operator, with the reference formula in the same dtype, which shows torch's own
accuracy, and with the reference in float64 on the same inputs, which is the truth.
"""

import itertools
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import unlearn_fast
from unlearn_fast.benchmarking.rivals import released_dampen_
from unlearn_fast.info import table
from unlearn_fast.scenario import Scenario, Tensors
from unlearn_fast.scenarios import importances, scenarios

# tolerance = FACTOR * torch's own error + the scenario's ulps of the computing dtype + half an ulp of the result's,
# and at most LIMIT: what is wrong by more fails, however inaccurate torch is there.
# FACTOR: two equally accurate computations round differently, and which has the larger worst error is luck. For the
# same reason torch's own error is the largest of DRAWS random inputs.
# Half an ulp: the rounding of the result, which a 16-bit dtype cannot avoid.
FACTOR, DRAWS, LIMIT = 2.0, 3, 0.1


@dataclass(frozen=True)
class Check:
    """One result of one scenario. Errors are relative, see `relative_error`."""

    operator: str
    scenario: str
    result: str
    dtype: str
    device: str
    error: float
    torch_error: float
    tolerance: float
    note: str = ""  # what was raised

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def relative_error(result: Tensor, exact: Tensor, cancels: bool = False, flushes: bool = False) -> float:
    """Largest error of an element, relative to it, or to the median magnitude of all where that is larger.

    With `cancels`, the root mean square takes the median's place. Equal NaN and infinities are right; where the truth
    is exactly 0, so must the result be; a few of the dtype's smallest numbers are no error. With `flushes`, nor are
    a few of float32's smallest normal ones, in whose place there may be a 0.
    """
    if result.shape != exact.shape:
        return float("inf")
    limits = torch.finfo(result.dtype)
    underflow = 4 * limits.smallest_normal * limits.eps
    if flushes:
        underflow = max(underflow, 4 * torch.finfo(torch.float32).smallest_normal)
    result, exact = result.detach().cpu().double(), exact.detach().cpu().double()
    magnitudes = exact.abs()
    ordinary = magnitudes[(exact != 0) & exact.isfinite()]
    if not len(ordinary):
        typical = magnitudes.new_ones(())
    else:
        typical = ordinary.square().mean().sqrt() if cancels else ordinary.median()
    errors = ((result - exact).abs() - underflow).clamp(min=0) / magnitudes.maximum(typical)
    errors = errors.masked_fill((exact == 0) & (result != 0), float("inf")).nan_to_num(nan=float("inf"))
    errors = errors.masked_fill((result == exact) | (result.isnan() & exact.isnan()), 0)
    return errors.max().item() if errors.numel() else 0.0


def run_checks(devices: Sequence[str] | None = None, operator: str | None = None) -> Iterator[Check]:
    """Every scenario in every dtype, or one operator's, on these devices: by default the CPU, and the GPU where there
    is one.
    """
    if devices is None:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device, scenario in itertools.product(devices, scenarios()):
        for dtype in scenario.dtypes if operator in (None, scenario.operator) else ():
            yield from _check(scenario, dtype, device)
    for device, exponent in itertools.product(devices, (1.0, 2.0, 3.0) if operator in (None, "dampen_") else ()):
        yield _check_released_bits(device, exponent)


def text(checks: list[Check]) -> str:
    """A table with the tightest check of each operator, dtype and device, then every failure."""
    rows = []
    for (device, operator, dtype), group in itertools.groupby(sorted(checks, key=_group), key=_group):
        members = list(group)
        worst = max(members, key=lambda c: (not c.passed, c.error / c.tolerance if c.tolerance else c.error))
        errors = tuple(f"{value:.1e}" for value in (worst.error, worst.torch_error, worst.tolerance))
        verdict = "PASS" if all(c.passed for c in members) else "FAIL"
        rows.append((operator, dtype, device, str(len(members)), *errors, verdict, f"{worst.result}, {worst.scenario}"))
    header = ("operator", "dtype", "device", "checks", "our error", "torch's", "tolerance", "", "tightest check")
    failed = [c for c in checks if not c.passed]
    lines = ["Errors relative to float64; the tolerance comes from torch's own error in the same dtype.", ""]
    lines += table(header, rows)
    lines += ["", f"{len(checks) - len(failed)} of {len(checks)} checks passed"]
    for c in failed:
        lines.append(
            f"FAIL {c.operator} {c.dtype} on {c.device}, {c.scenario}, {c.result}: "
            + (c.note or f"error {c.error:.3e}, tolerance {c.tolerance:.3e}")
        )
    return "\n".join(lines)


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {
        "passed": all(c.passed for c in checks),
        "factor": FACTOR,
        "draws": DRAWS,
        "limit": LIMIT,
        "checks": [
            # JSON has no infinity, which is the error of a result of the wrong shape, say
            {**asdict(c), "error": c.error if math.isfinite(c.error) else None, "passed": c.passed}
            for c in sorted(checks, key=_group)
        ],
    }


def _group(check: Check) -> tuple[str, str, str]:
    return check.device, check.operator, check.dtype


def _check(scenario: Scenario, dtype: torch.dtype, device: str) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{scenario.operator} {scenario.name}".encode()))
    draws = [scenario.inputs(generator) for _ in range(DRAWS)]
    name = str(dtype).removeprefix("torch.")
    wide = torch.promote_types(dtype, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the released signs of some divergences warn, as they should
        exact = scenario.run(scenario.reference, _double(_cast(scenario, draws[0], dtype)))
        try:
            results = scenario.run(scenario.ours, _cast(scenario, draws[0], dtype, device))
        except Exception as raised:
            yield _raised(raised, scenario.operator, scenario.name, name, device)
            return
        own = [_own_errors(scenario, inputs, dtype, device) for inputs in draws]
    for key, result in results.items():
        torch_error = max(errors[key] for errors in own)
        tolerance = scenario.ulps * torch.finfo(wide).eps + torch.finfo(result.dtype).eps / 2
        tolerance += 0.0 if scenario.beyond_torch else FACTOR * torch_error
        flushes = device == "cuda" and dtype != torch.float64  # the exponentials of GPUs do
        error = relative_error(result, exact[key], scenario.cancels, flushes)
        yield Check(scenario.operator, scenario.name, key, name, device, error, torch_error, min(tolerance, LIMIT))


def _own_errors(scenario: Scenario, inputs: Tensors, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The reference formula's errors in `dtype`. For float64, which has no finer truth: float32's in its ulps."""
    run_in = torch.float32 if dtype == torch.float64 else dtype
    exact = scenario.run(scenario.reference, _double(_cast(scenario, inputs, run_in)))
    own = scenario.run(scenario.reference, _cast(scenario, inputs, run_in, device))
    finer = torch.finfo(dtype).eps / torch.finfo(run_in).eps
    return {key: relative_error(value, exact[key], scenario.cancels) * finer for key, value in own.items()}


def _check_released_bits(device: str, exponent: float) -> Check:
    """Float32 dampening against the released formula, bit for bit: the error is the share of differing elements."""
    generator = torch.Generator().manual_seed(0)
    p, f, r = (x.float().to(device) for x in importances(100_003)(generator).values())
    expected = p.clone()
    settings: dict[str, Any] = {"alpha": 2.0, "lam": 3.0, "exponent": exponent, "cap": 0.9}
    released_dampen_(expected, f, r, **settings)
    title = f"exponent {exponent}, released code's bits"
    try:
        unlearn_fast.dampen_([p], [f], [r], **settings)
    except Exception as raised:
        return _raised(raised, "dampen_", title, "float32", device)
    differing = (p.view(torch.int32) != expected.view(torch.int32)).double().mean().item()
    return Check("dampen_", title, "params", "float32", device, differing, 0.0, 0.0)


def _raised(error: Exception, operator: str, scenario: str, dtype: str, device: str) -> Check:
    """Whatever an operator raises is its failure, and is reported as such."""
    note = f"{type(error).__name__}: {error}"
    return Check(operator, scenario, "all", dtype, device, float("inf"), 0.0, 0.0, note)


def _cast(scenario: Scenario, inputs: Tensors, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Fresh tensors in the scenario's dtypes."""
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = {name: wide if name in scenario.wide else dtype for name in inputs}
    return {
        name: x.to(device, dtypes[name] if x.is_floating_point() else x.dtype, copy=True) for name, x in inputs.items()
    }


def _double(inputs: Tensors) -> Tensors:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
