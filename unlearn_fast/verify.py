"""Checks every operator on this machine: values and gradients against the references in float64.

A scenario runs three times: with our operator, with the reference formula in the same dtype, which shows torch's own
accuracy, and with the reference in float64 on the same inputs, which is the truth.
"""

import itertools
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import unlearn_fast
from unlearn_fast import losses, reference
from unlearn_fast.benchmarking.rivals import released_dampen_
from unlearn_fast.info import table
from unlearn_fast.losses.divergences import PAPER
from unlearn_fast.reference import flat

Tensors = dict[str, Tensor]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# tolerance = FACTOR * torch's own error + FLOOR ulps of the computing dtype + half an ulp of the result's dtype.
# FACTOR: two equally accurate computations round differently; which of them has the larger worst error is luck.
# FLOOR: torch is sometimes exact by luck; exp, sum, log and product may each cost an ulp.
# Half an ulp: the rounding of the result, which a 16-bit dtype cannot avoid.
# LIMIT: a result that is wrong by more than this fails, however inaccurate torch is there.
FACTOR, FLOOR, LIMIT = 2.0, 4.0, 0.1


@dataclass(frozen=True)
class Scenario:
    """What to compute from which inputs; `run` works with either library, which have the same names and signatures."""

    operator: str
    name: str
    inputs: Callable[[torch.Generator], Tensors]  # float64, and integers
    run: Callable[[ModuleType, Tensors], Tensors]
    ours: ModuleType = unlearn_fast
    reference: ModuleType = reference
    wide: tuple[str, ...] = ()  # inputs that stay in at least float32
    dtypes: tuple[torch.dtype, ...] = DTYPES
    beyond_torch: bool = False  # torch loses the result there: only the floor counts


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


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Largest error of an element, relative to it, or to the median magnitude of all where that is larger.

    Equal NaN and infinities are right; where the truth is exactly 0, so must the result be.
    """
    if result.shape != exact.shape:
        return float("inf")
    result, exact = result.detach().cpu().double(), exact.detach().cpu().double()
    magnitudes = exact.abs()
    ordinary = magnitudes[(exact != 0) & exact.isfinite()]
    typical = ordinary.median() if len(ordinary) else magnitudes.new_ones(())
    errors = (result - exact).abs() / magnitudes.maximum(typical)
    errors = errors.masked_fill((exact == 0) & (result != 0), float("inf")).nan_to_num(nan=float("inf"))
    errors = errors.masked_fill((result == exact) | (result.isnan() & exact.isnan()), 0)
    return errors.max().item() if errors.numel() else 0.0


def run_checks() -> Iterator[Check]:
    """Every scenario in every dtype, on the CPU and on the GPU where there is one."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device, scenario in itertools.product(devices, scenarios()):
        for dtype in scenario.dtypes:
            yield from _check(scenario, dtype, device)
    for device, exponent in itertools.product(devices, (0.5, 1.0, 2.0)):
        yield _check_released_bits(device, exponent)


def text(checks: list[Check]) -> str:
    """A table with the tightest check of each operator, dtype and device, then every failure."""
    rows = []
    for (operator, device, dtype), group in itertools.groupby(checks, key=lambda c: (c.operator, c.device, c.dtype)):
        members = list(group)
        worst = max(members, key=lambda c: (not c.passed, c.error / c.tolerance if c.tolerance else c.error))
        errors = tuple(f"{value:.1e}" for value in (worst.error, worst.torch_error, worst.tolerance))
        verdict = "PASS" if all(c.passed for c in members) else "FAIL"
        rows.append((operator, dtype, device, str(len(members)), *errors, verdict, f"{worst.result}, {worst.scenario}"))
    header = ("operator", "dtype", "device", "checks", "our error", "torch's", "tolerance", "", "tightest check")
    failed = [c for c in checks if not c.passed]
    lines = ["Errors relative to float64; tolerance from torch's own error in the same dtype.", "", *table(header, rows)]
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
        "floor_ulps": FLOOR,
        "limit": LIMIT,
        "checks": [{**asdict(c), "passed": c.passed} for c in sorted(checks, key=_group)],
    }


def _check(scenario: Scenario, dtype: torch.dtype, device: str) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{scenario.operator} {scenario.name}".encode()))
    inputs = scenario.inputs(generator)
    name = str(dtype).removeprefix("torch.")
    wide = torch.promote_types(dtype, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the released signs of some divergences warn, as they should
        exact = scenario.run(scenario.reference, _double(_cast(scenario, inputs, dtype)))
        try:
            results = scenario.run(scenario.ours, _cast(scenario, inputs, dtype, device))
        except Exception as error:  # whatever an operator raises here is its failure, and is reported as such
            note = f"{type(error).__name__}: {error}"
            yield Check(scenario.operator, scenario.name, "all", name, device, float("inf"), 0.0, 0.0, note)
            return
        own = _own_errors(scenario, inputs, dtype, device)
    for key, result in results.items():
        tolerance = FLOOR * torch.finfo(wide).eps + torch.finfo(result.dtype).eps / 2
        tolerance += 0.0 if scenario.beyond_torch else FACTOR * own[key]
        error = relative_error(result, exact[key])
        yield Check(
            scenario.operator, scenario.name, key, name, device, error, own[key], min(tolerance, LIMIT)
        )


def _own_errors(scenario: Scenario, inputs: Tensors, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The reference formula's errors in `dtype`. In float64 there is no truth to compare with: float32's, in its ulps."""
    run_in = torch.float32 if dtype == torch.float64 else dtype
    exact = scenario.run(scenario.reference, _double(_cast(scenario, inputs, run_in)))
    own = scenario.run(scenario.reference, _cast(scenario, inputs, run_in, device))
    finer = torch.finfo(dtype).eps / torch.finfo(run_in).eps
    return {key: relative_error(value, exact[key]) * finer for key, value in own.items()}


def _check_released_bits(device: str, exponent: float) -> Check:
    """Float32 dampening against the released formula, bit for bit: the error is the share of differing elements."""
    generator = torch.Generator().manual_seed(0)
    p, f, r = (x.float().to(device) for x in _importances(100_003)(generator).values())
    expected = p.clone()
    settings = {"alpha": 2.0, "lam": 3.0, "exponent": exponent, "cap": 0.9}
    released_dampen_(expected, f, r, **settings)
    unlearn_fast.dampen_([p], [f], [r], **settings)
    differing = (p.view(torch.int32) != expected.view(torch.int32)).double().mean().item()
    return Check("dampen_", f"exponent {exponent}, released code's bits", "params", "float32", device, differing, 0.0, 0.0)


def _cast(scenario: Scenario, inputs: Tensors, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Fresh tensors in the scenario's dtypes."""
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = {name: wide if name in scenario.wide else dtype for name in inputs}
    return {
        name: x.to(device, dtypes[name] if x.is_floating_point() else x.dtype, copy=True) for name, x in inputs.items()
    }


def _double(inputs: Tensors) -> Tensors:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


# -- scenarios ---------------------------------------------------------------------------------------------------------


def scenarios() -> Iterator[Scenario]:
    yield from _token_scenarios()
    yield from _linear_scenarios()
    yield from _squares_scenarios()
    yield from _dampen_scenarios()
    yield from _flat_scenarios()


def _token_scenarios() -> Iterator[Scenario]:
    name = "token_logprobs"
    shapes = [(1, 1), (7, 2), (2, 3, 33), (5, 1031), (3, 4097), (0, 5)]
    for shape, inplace in itertools.product(shapes, (False, True)):
        title = f"{list(shape)}{', in place' if inplace else ''}"
        yield Scenario(name, title, _logits(shape), _token_logprobs(inplace=inplace))
    yield Scenario(name, "[3, 6, 129] without its last position", _logits((3, 6, 129)), _token_logprobs(shifted=True))
    # Multiples of 1/8, so that no dtype rounds the distances between logits.
    confident = _logits((6, 65), ignore=False, spread=lambda z: (z * 8).round() / 8, lift=24.0)
    single = (torch.float32, torch.bfloat16, torch.float16)  # the float64 reference has no digits of 1 - p to spare
    yield Scenario(name, "[6, 65], p near 1", confident, _token_logprobs(), dtypes=single, beyond_torch=True)
    huge = _logits((4, 300), spread=lambda z: z * 60)
    yield Scenario(name, "[4, 300], logits up to 200", huge, _token_logprobs())


def _logits(
    shape: tuple[int, ...],
    ignore: bool = True,
    spread: Callable[[Tensor], Tensor] = lambda z: z,
    lift: float = 0.0,  # what is added to the label's logit
) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        labels = torch.randint(shape[-1], shape[:-1], generator=generator)
        logits = spread(torch.randn(shape, generator=generator, dtype=torch.float64))
        logits += lift * torch.nn.functional.one_hot(labels, shape[-1])
        if ignore and labels.numel() > 2:
            labels.view(-1)[1] = -100
        return {"logits": logits, "labels": labels, "grad": _cotangent(shape[:-1], generator)}

    return inputs


def _token_logprobs(inplace: bool = False, shifted: bool = False) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaf, labels = x["logits"].requires_grad_(), x["labels"]
        logits, grad = leaf * 1, x["grad"]  # not a leaf, which must not be overwritten; * 1 is exact
        if shifted:
            logits, labels, grad = logits[:, :-1], labels[:, 1:], grad[:, 1:]
        logp = library.token_logprobs(logits, labels, inplace_backward=inplace)
        (gradient,) = torch.autograd.grad(logp, leaf, grad.to(logp.dtype))
        return {"value": logp, "grad of logits": gradient}

    return run


def _linear_scenarios() -> Iterator[Scenario]:
    for N, H, V, chunk_bytes in ((1, 1, 1, 1), (5, 3, 7, 64), (9, 64, 1025, 3 * 8 * 1025), (0, 4, 6, 64)):
        title = f"[{N}, {H}] x [{V}, {H}], chunks of {chunk_bytes} bytes"
        yield Scenario("linear_token_logprobs", title, _hidden(N, H, V), _linear_token_logprobs(chunk_bytes))


def _hidden(N: int, H: int, V: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        hidden, weight, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, H), (V, H), (V,))
        )
        labels = torch.randint(V, (N,), generator=generator)
        labels[2:3] = -100
        return {
            "hidden": hidden, "weight": weight / H**0.5, "bias": bias, "labels": labels,
            "grad": _cotangent((N,), generator),
        }  # fmt: skip

    return inputs


def _linear_token_logprobs(chunk_bytes: int) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaves = {name: x[name].requires_grad_() for name in ("hidden", "weight", "bias")}
        logp = library.linear_token_logprobs(**leaves, labels=x["labels"], chunk_bytes=chunk_bytes)
        gradients = torch.autograd.grad(logp, list(leaves.values()), x["grad"].to(logp.dtype))
        return {"value": logp, **{f"grad of {n}": g for n, g in zip(leaves, gradients, strict=True)}}

    return run


def _squares_scenarios() -> Iterator[Scenario]:
    name = "sum_grad_squared_linear_"
    for B, T, O, I in ((1, 1, 1, 1), (3, 7, 5, 11), (4, 1, 33, 65), (2, 300, 97, 130), (5, 0, 3, 2)):  # noqa: E741
        yield Scenario(name, f"B {B}, T {T}, O {O}, I {I}", _products((B, T), O, I), _add_squares())
    yield Scenario(name, "B 9, O 17, I 31, no T", _products((9,), 17, 31), _add_squares())
    swapped = _add_squares(swap=True)
    yield Scenario(name, "B 6, T 5, O 12, I 40, B and T swapped in memory", _products((5, 6), 12, 40), swapped)


def _products(leading: tuple[int, ...], O: int, I: int) -> Callable[[torch.Generator], Tensors]:  # noqa: E741
    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {"out": (O, I), "inputs": (*leading, I), "grad_outputs": (*leading, O)}
        return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    return inputs


def _add_squares(swap: bool = False) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        a, g = x["inputs"], x["grad_outputs"]
        out = x["out"].to(torch.promote_types(a.dtype, torch.float32)).abs()
        if swap:
            a, g = a.transpose(0, 1), g.transpose(0, 1)
        return {"out": library.sum_grad_squared_linear_(out, a, g, scale=0.3)}

    return run


def _dampen_scenarios() -> Iterator[Scenario]:
    wide = ("forget", "reference")
    for n in (0, 1, 127, 70_001):
        yield Scenario("dampen_", f"[{n}]", _importances(n), _dampen(), wide=wide)
    yield Scenario("dampen_", "[128], every second element", _importances(256), _dampen(step=2), wide=wide)
    yield Scenario("dampen_", "[999], importances in the parameter's dtype", _importances(999), _dampen())
    yield Scenario("dampen_", "zero, infinite and NaN", _hostile, _dampen(), wide=wide)


def _importances(n: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        p, f, r = torch.randn(3, n, generator=generator, dtype=torch.float64)
        return {"params": p, "forget": (2 * f - 4).exp(), "reference": (2 * r - 4).exp()}

    return inputs


def _hostile(_: torch.Generator) -> Tensors:
    special = (0.0, 1e-30, 1.0, float("inf"), float("nan"))
    p, f, r = zip(*itertools.product((1.5, 0.0, -2.0), special, special), strict=True)
    return {n: torch.tensor(x, dtype=torch.float64) for n, x in (("params", p), ("forget", f), ("reference", r))}


def _dampen(step: int = 1) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        p, f, r = (x[name][::step] for name in ("params", "forget", "reference"))
        report = library.dampen_([p], [f], [r], alpha=2.0, lam=3.0, cap=0.9)
        return {"params": x["params"], "counts": report.stats[:, :3]}

    return run


def _flat_scenarios() -> Iterator[Scenario]:
    libraries: dict[str, Any] = {"ours": losses, "reference": flat}
    for divergence, formulation in itertools.product(PAPER, ("paper", "official")):
        title = f"{divergence}, {formulation}"
        yield Scenario("flat_loss", title, _answers, _flat_loss(divergence, formulation), **libraries)
        yield Scenario("linear_flat_loss", title, _answers, _linear_flat_loss(divergence, formulation), **libraries)


def _answers(generator: torch.Generator) -> Tensors:
    """Hidden states of 3 questions with uneven answers, one of them empty; V = 37, H = 6."""
    inputs: Tensors = {"weight": torch.randn(37, 6, generator=generator, dtype=torch.float64)}
    for side, T, lengths in (("template", 9, (4, 1, 6)), ("forget", 7, (5, 3, 0))):
        inputs[side] = torch.randn(3, T, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(37, (3, T), generator=generator)
        for row, n in zip(labels, lengths, strict=True):
            row[0] = -100
            row[1 + n :] = -100
        inputs[f"{side}_labels"] = labels
    return inputs


def _flat_loss(divergence: str, formulation: str) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        options = {"divergence": divergence, "formulation": formulation}
        template, forget = ((x[side] @ x["weight"].T).requires_grad_() for side in ("template", "forget"))
        loss = library.flat_loss(template, x["template_labels"], forget, x["forget_labels"], **options)
        d_template, d_forget = torch.autograd.grad(loss, (template, forget))
        return {
            "template side": library.flat_template_loss(template, x["template_labels"], **options),
            "forget side": library.flat_forget_loss(forget, x["forget_labels"], **options),
            "grad of template": d_template,
            "grad of forget": d_forget,
        }

    return run


def _linear_flat_loss(divergence: str, formulation: str) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaves = [x[name].requires_grad_() for name in ("template", "forget", "weight")]
        template, forget, weight = leaves
        sides = template, x["template_labels"], forget, x["forget_labels"]
        loss = library.linear_flat_loss(*sides, weight, divergence=divergence, formulation=formulation)
        d_template, d_forget, d_weight = torch.autograd.grad(loss, leaves)
        return {"value": loss, "grad of template": d_template, "grad of forget": d_forget, "grad of weight": d_weight}

    return run


def _cotangent(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Between 0.5 and 2 in size, of either sign."""
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    return values * (1 - 2 * torch.randint(2, shape, generator=generator))
