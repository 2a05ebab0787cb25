"""What `verify` computes of the sequence losses: each from logits, and from hidden states in chunks and in pieces."""

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unlearn_fast.losses.divergences import PAPER
from unlearn_fast.scenario import Scenario, Tensors

# name -> what it takes after hidden states and labels of its sides, in the order of its parameters, and its options
ONE_SIDED: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "gradient_ascent_loss": ((), {}),
    "npo_loss": (("forget_reference",), {"beta": 0.2}),
    "simnpo_loss": ((), {"beta": 0.5, "delta": 0.3}),
    "wga_loss": ((), {"beta": 0.5}),
    "satimp_loss": ((), {"beta1": 0.8, "beta2": 0.4}),
    "ceu_loss": ((), {}),
    "kl_retain_loss": (("teacher",), {}),
    "undial_loss": (("teacher",), {"strength": 3.0}),
}
TWO_SIDED: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "grad_diff_loss": ((), {"retain_weight": 0.7}),
    "dpo_loss": (("template_reference", "forget_reference"), {"beta": 0.3}),
}


def loss_scenarios() -> Iterator[Scenario]:
    yield from _flat_scenarios()
    for sides, family in ((("forget",), ONE_SIDED), (("template", "forget"), TWO_SIDED)):
        for name, (constants, numbers) in family.items():
            options: dict[str, Any] = {"cancels": True, "ulps": 32}
            if constants == ("teacher",):
                inputs = _answers_and_teacher
            else:
                inputs, options["wide"] = _answers, constants
            yield Scenario(name, "[3, T, 37]", inputs, _from_logits(name, sides, constants, numbers), **options)
            for title, chunk_bytes in (("at once", 1 << 20), ("in chunks", 8 * 37 * 2), ("in pieces", 1)):
                run = _from_hidden(name, sides, constants, {**numbers, "chunk_bytes": chunk_bytes})
                yield Scenario(f"linear_{name}", title, inputs, run, **options)

    for reduction, smoothing in itertools.product(("mean", "none"), (0.0, 0.1)):
        title = f"{reduction}, smoothed by {smoothing:g}"
        run = _cross_entropy(reduction=reduction, label_smoothing=smoothing, chunk_bytes=8 * 37 * 2)
        yield Scenario("linear_cross_entropy", title, _answers, run, cancels=True, ulps=32)


def _cross_entropy(**options: Any) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaves = [x[name].requires_grad_() for name in ("forget", "weight")]
        loss = library.linear_cross_entropy(*leaves, x["forget_labels"], **options)
        d_input, d_weight = torch.autograd.grad(loss.sum(), leaves)
        return {"value": loss, "grad of input": d_input, "grad of weight": d_weight}

    return run


def _answers_and_teacher(generator: torch.Generator) -> Tensors:
    inputs = _answers(generator)
    return inputs | {"teacher": torch.randn(inputs["forget"].shape, generator=generator, dtype=torch.float64)}


def _from_logits(
    name: str, sides: tuple[str, ...], constants: tuple[str, ...], options: dict[str, float]
) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        logits = [(x[side] @ x["weight"].T).requires_grad_() for side in sides]
        arguments = [t for side, z in zip(sides, logits, strict=True) for t in (z, x[f"{side}_labels"])]
        others = [x[c] @ x["weight"].T if c == "teacher" else x[c] for c in constants]
        loss = getattr(library, name)(*arguments, *others, **options)
        grads = torch.autograd.grad(loss, logits)
        return {"value": loss, **{f"grad of {side}": g for side, g in zip(sides, grads, strict=True)}}

    return run


def _from_hidden(
    name: str, sides: tuple[str, ...], constants: tuple[str, ...], options: dict[str, float]
) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaves = [x[n].requires_grad_() for n in (*sides, "weight")]
        arguments = [t for side in sides for t in (x[side], x[f"{side}_labels"])]
        others = [x["teacher"], x["weight"].detach()] if constants == ("teacher",) else [x[c] for c in constants]
        loss = getattr(library, f"linear_{name}")(
            *arguments, x["weight"], *others, weight_grad_dtype=_wide(x["weight"]), **options
        )
        grads = torch.autograd.grad(loss, leaves)
        return {"value": loss, **{f"grad of {n}": g for n, g in zip((*sides, "weight"), grads, strict=True)}}

    return run


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _flat_scenarios() -> Iterator[Scenario]:
    options: dict[str, Any] = {"cancels": True, "ulps": 32}  # exp(log p) costs |log p|
    for divergence, formulation in itertools.product(PAPER, ("paper", "official")):
        title = f"{divergence}, {formulation}"
        yield Scenario("flat_loss", title, _answers, _flat_loss(divergence, formulation), **options)
        yield Scenario("linear_flat_loss", title, _answers, _linear_flat_loss(divergence, formulation), **options)


def _answers(generator: torch.Generator) -> Tensors:
    """Hidden states of 3 questions with uneven answers, one of them empty; V = 37, H = 6.

    The model expects the forget answers, as before unlearning, so that the two sides of a loss do not cancel.
    """
    inputs: Tensors = {"weight": torch.randn(37, 6, generator=generator, dtype=torch.float64)}
    for side, T, lengths in (("template", 9, (4, 1, 6)), ("forget", 7, (5, 3, 0))):
        inputs[side] = torch.randn(3, T, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(37, (3, T), generator=generator)
        for row, n in zip(labels, lengths, strict=True):
            row[0] = -100
            row[1 + n :] = -100
        inputs[f"{side}_labels"] = labels
        inputs[f"{side}_reference"] = -9 * torch.rand(3, generator=generator, dtype=torch.float64)
    expected = inputs["weight"][inputs["forget_labels"].roll(-1, dims=1).clamp(min=0)]
    inputs["forget"] += expected
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
