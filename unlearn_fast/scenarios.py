"""What `verify` computes: every operator in ordinary and in awkward shapes, on ordinary and on hostile values."""

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from unlearn_fast.loss_scenarios import loss_scenarios
from unlearn_fast.scenario import Scenario, Tensors, cotangent
from unlearn_fast.token_scenarios import token_scenarios


def scenarios() -> Iterator[Scenario]:
    yield from token_scenarios()
    yield from _linear_scenarios()
    yield from _squares_scenarios()
    yield from _moments_scenarios()
    yield from _convolution_scenarios()
    yield from _dampen_scenarios()
    yield from loss_scenarios()


def _linear_scenarios() -> Iterator[Scenario]:
    for N, H, V, chunk_bytes in ((1, 1, 1, 1), (5, 3, 7, 64), (9, 64, 1025, 3 * 8 * 1025), (0, 4, 6, 64)):
        title = f"[{N}, {H}] x [{V}, {H}], chunks of {chunk_bytes} bytes"
        run = _linear_token_logprobs(chunk_bytes)
        yield Scenario("linear_token_logprobs", title, _hidden(N, H, V), run, ulps=16, cancels=True)


def _hidden(N: int, H: int, V: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        hidden, weight, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, H), (V, H), (V,))
        )
        labels = torch.randint(V, (N,), generator=generator)
        labels[2:3] = -100
        return {
            "hidden": hidden, "weight": weight / H**0.5, "bias": bias, "labels": labels,
            "grad": cotangent((N,), generator),
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
    for leading, absolute in itertools.product(((9,), (9, 6), (2, 300)), (False, True)):
        title = f"weighted, first moments, {list(leading)}{', magnitudes' if absolute else ''}"
        run, wide = _add_moments(absolute), ("out", "first", "weights")
        yield Scenario(name, title, _weighted_products(leading, 17, 31), run, wide=wide)
    yield Scenario(name, "B 9, O 17, I 31, no T", _products((9,), 17, 31), _add_squares())
    swapped = _add_squares(swap=True)
    yield Scenario(name, "B 6, T 5, O 12, I 40, B and T swapped in memory", _products((5, 6), 12, 40), swapped)


def _moments_scenarios() -> Iterator[Scenario]:
    name = "sum_grad_squared_embedding_"
    for B, T, H, V in ((1, 1, 1, 1), (3, 9, 5, 4), (2, 300, 70, 9), (2, 5, 4100, 3), (2, 0, 3, 2)):
        yield Scenario(name, f"B {B}, T {T}, H {H}, V {V}", _embedded(B, T, H, V), _add_embedding(), cancels=True)
    name = "sum_grad_squared_scale_"
    for B, T, C in ((1, 1, 1), (3, 7, 5), (40, 1, 65), (2, 1000, 33), (2, 3, 4100), (5, 0, 3)):
        for first in (False, True):
            title, scaled = f"B {B}, T {T}, C {C}{', channels first' if first else ''}", _scaled(B, T, C)
            yield Scenario(name, title, scaled, _add_scale(first), cancels=True)
            yield Scenario(name, f"{title}, bias", scaled, _add_scale(first, bias=True), cancels=True)


def _embedded(B: int, T: int, H: int, V: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {"out": (V, H), "first": (V, H), "grad_outputs": (B, T, H), "weights": (B,)}
        tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        return {**tensors, "tokens": torch.randint(-1, V, (B, T), generator=generator)}

    return inputs


def _scaled(B: int, T: int, C: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {"out": (C,), "first": (C,), "inputs": (B, T, C), "grad_outputs": (B, T, C), "weights": (B,)}
        return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    return inputs


def _add_embedding() -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        targets, options = _targets(x)
        library.sum_grad_squared_embedding_(targets["out"], x["tokens"], x["grad_outputs"], **options)
        library.sum_grad_squared_embedding_(targets["absolute"], x["tokens"], x["grad_outputs"], absolute=True)
        return targets

    return run


def _add_scale(channels_first: bool, bias: bool = False) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        a, g = x["inputs"], x["grad_outputs"]
        if channels_first:
            a, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, g))
        targets, options = _targets(x)
        library.sum_grad_squared_scale_(targets["out"], None if bias else a, g, **options)
        library.sum_grad_squared_scale_(targets["absolute"], None if bias else a, g, absolute=True)
        return targets

    return run


def _targets(x: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """What the sums are added to, and the options of a call with weights and first moment."""
    out, first, weights = (x[n].to(torch.promote_types(x[n].dtype, torch.float32)) for n in ("out", "first", "weights"))
    targets = {"out": out.abs(), "absolute": out.abs(), "first": first}
    return targets, {"scale": 0.3, "weights": weights.abs(), "first": first}


def _products(leading: tuple[int, ...], O: int, I: int) -> Callable[[torch.Generator], Tensors]:  # noqa: E741
    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {"out": (O, I), "inputs": (*leading, I), "grad_outputs": (*leading, O)}
        return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    return inputs


def _weighted_products(leading: tuple[int, ...], O: int, I: int) -> Callable[[torch.Generator], Tensors]:  # noqa: E741
    """Of one sign: first moments then have no terms that cancel."""
    shapes = {
        "out": (O, I),
        "first": (O, I),
        "weights": leading[:1],
        "inputs": (*leading, I),
        "grad_outputs": (*leading, O),
    }

    def inputs(generator: torch.Generator) -> Tensors:
        return {n: torch.rand(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    return inputs


def _add_moments(absolute: bool) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        library.sum_grad_squared_linear_(**x, absolute=absolute, scale=0.3)
        return {"out": x["out"], "first": x["first"]}

    return run


def _add_squares(swap: bool = False) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        a, g = x["inputs"], x["grad_outputs"]
        out = x["out"].to(torch.promote_types(a.dtype, torch.float32)).abs()
        if swap:
            a, g = a.transpose(0, 1), g.transpose(0, 1)
        return {"out": library.sum_grad_squared_linear_(out, a, g, scale=0.3)}

    return run


def _convolution_scenarios() -> Iterator[Scenario]:
    name = "sum_grad_squared_conv_"
    layers: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
        "2d, channels fill vectors": ((3, 1, 33), (9, 8), (13, 33, 3, 3), {"padding": 1}),
        "2d, a first layer": ((2, 1, 3), (19, 18), (20, 3, 5, 5), {"stride": 2, "padding": 2}),
        "1d, several images an example": ((2, 3, 24), (600,), (7, 24, 4), {"stride": 3, "dilation": 2}),
        "3d, groups": ((2, 1, 10), (4, 5, 6), (6, 5, 2, 3, 1), {"groups": 2, "padding": (1, 0, 2)}),
        "2d, depthwise": ((5, 1, 40), (7, 9), (80, 1, 3, 3), {"groups": 40, "padding": 1}),
        "2d, no examples": ((0, 1, 3), (5, 5), (2, 3, 3, 3), {}),
    }
    for (title, layer), absolute in itertools.product(layers.items(), (False, True)):
        leading, size, weight, settings = layer
        inputs = _images(leading, size, weight, settings)
        run, wide = _add_of_images(settings, absolute), ("out", "first", "weights")
        yield Scenario(name, f"{title}{', magnitudes' if absolute else ''}", inputs, run, wide=wide)


def _images(
    leading: tuple[int, ...], size: tuple[int, ...], weight: tuple[int, ...], settings: dict[str, Any]
) -> Callable[[torch.Generator], Tensors]:
    """Of one sign: squares and first moments then have no terms that cancel."""
    axes = len(size)
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[axes - 1]
    positions = convolve(torch.zeros(1, leading[-1], *size), torch.zeros(weight), **settings).shape[2:]

    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {
            "out": weight, "first": weight, "weights": leading[:1], "inputs": (*leading, *size),
            "grad_outputs": (*leading[:-1], weight[0], *positions),
        }  # fmt: skip
        return {n: torch.rand(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    return inputs


def _add_of_images(settings: dict[str, Any], absolute: bool) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        options = {**settings, "absolute": absolute, "weights": x["weights"], "first": x["first"], "scale": 0.3}
        library.sum_grad_squared_conv_(x["out"], x["inputs"], x["grad_outputs"], **options)
        return {"out": x["out"], "first": x["first"]}

    return run


def _dampen_scenarios() -> Iterator[Scenario]:
    wide = ("forget", "reference")
    for n in (0, 1, 127, 70_001):
        yield Scenario("dampen_", f"[{n}]", importances(n), _dampen(), wide=wide)
    yield Scenario("dampen_", "[128], every second element", importances(256), _dampen(step=2), wide=wide)
    yield Scenario("dampen_", "[999], importances in the parameter's dtype", importances(999), _dampen())
    yield Scenario("dampen_", "[999], exponent 0.5", importances(999), _dampen(exponent=0.5), wide=wide)
    yield Scenario("dampen_", "zero, infinite and NaN", _hostile, _dampen(), wide=wide)
    yield Scenario("dampen_", "[999], floor 0.3", importances(999), _dampen(floor=0.3), wide=wide)
    for n in (2, 129, 70_001):
        yield Scenario("alpha_for_percentile", f"[{n}]", importances(n), _percentiles)
        yield Scenario("selection_curve", f"[{n}]", importances(n), _curve, wide=wide)
        yield Scenario("top_fraction_mask", f"[{n}]", importances(n), _mask)


def importances(n: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        p, f, r = torch.randn(3, n, generator=generator, dtype=torch.float64)
        return {"params": p, "forget": (2 * f - 4).exp(), "reference": (2 * r - 4).exp()}

    return inputs


def _hostile(_: torch.Generator) -> Tensors:
    special = (0.0, 1e-30, 1.0, float("inf"), float("nan"))
    p, f, r = zip(*itertools.product((1.5, 0.0, -2.0), special, special), strict=True)
    return {n: torch.tensor(x, dtype=torch.float64) for n, x in (("params", p), ("forget", f), ("reference", r))}


def _dampen(step: int = 1, exponent: float = 1.0, floor: float = 0.0) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        p, f, r = (x[name][::step] for name in ("params", "forget", "reference"))
        report = library.dampen_([p], [f], [r], alpha=2.0, lam=3.0, exponent=exponent, cap=0.9, floor=floor)
        return {"params": x["params"], "counts": report.stats[:, :3]}

    return run


def _percentiles(library: ModuleType, x: Tensors) -> Tensors:
    f, r = x["forget"], x["reference"]
    wide = torch.promote_types(f.dtype, torch.float32)
    alphas = library.alpha_for_percentile([f[1:], f[:1]], [r[1:], r[:1]], [0.0, 12.5, 50.0, 99.9, 100.0])
    return {"alphas": torch.tensor(alphas, dtype=torch.float64).to(wide)}


def _curve(library: ModuleType, x: Tensors) -> Tensors:
    f, r = ({"a": x[name][1:], "b": x[name][:1]} for name in ("forget", "reference"))
    return {"counts": library.selection_curve(f, r, [0.0, 0.37, 1.9, 22.0]).counts.double()}


def _mask(library: ModuleType, x: Tensors) -> Tensors:
    masks = library.top_fraction_mask([x["forget"][1:], x["forget"][:1]], 0.3)
    return {"mask": torch.cat(masks).double()}
