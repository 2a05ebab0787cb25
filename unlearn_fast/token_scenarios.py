"""What `verify` computes of the operators over rows of logits."""

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unlearn_fast.scenario import Scenario, Tensors, cotangent


def token_scenarios() -> Iterator[Scenario]:
    yield from _token_scenarios()
    yield from _statistics_scenarios()
    yield from _kl_scenarios()
    yield from _drop_in_scenarios()


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
        return {"logits": logits, "labels": labels, "grad": cotangent(shape[:-1], generator)}

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


CAPPED = {"softcap": 5.0}
SCALINGS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.5}, CAPPED, {**CAPPED, "temperature": 2.0})
DIFFERENTIABLE = ("logp", "lse", "entropy", "mean_logit")


def _statistics_scenarios() -> Iterator[Scenario]:
    shapes = [(1, 1), (7, 2), (2, 3, 33), (3, 4097), (2, 40_001), (0, 5)]
    for shape, scaling in itertools.product(shapes, SCALINGS):
        run = _token_statistics(**scaling)
        title = f"{list(shape)}{''.join(f', {n} {v}' for n, v in scaling.items())}"
        yield Scenario("token_statistics", title, _logits(shape), run, ulps=_ulps(shape), cancels=True)
    inputs, run = _logits((3, 6, 129)), _token_statistics(shift=True, **CAPPED)
    yield Scenario("token_statistics", "[3, 6, 129], shifted by one", inputs, run, ulps=16, cancels=True)


def _ulps(shape: tuple[int, ...]) -> float:
    """lse and entropy, of the size of log V, cancel in the gradients; in float64 the truth's own rounding shows too."""
    return 16.0 if shape[-1] < 10_000 else 64.0


def _token_statistics(**options: Any) -> Callable[[ModuleType, Tensors], Tensors]:
    """The gradient of each statistic on its own, and of all."""

    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaf, labels, grad = x["logits"].requires_grad_(), x["labels"], x["grad"]
        result = library.token_statistics(leaf, labels, **options)
        values = {name: getattr(result, name) for name in (*DIFFERENTIABLE, "max_logit")}
        gradients = {}
        for names in (*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE):
            outputs = [values[name] for name in names]
            cotangents = [grad.to(o.dtype) for o in outputs]
            title = f"grad by {', '.join(names)}"
            (gradients[title],) = torch.autograd.grad(outputs, leaf, cotangents, retain_graph=True)
        return {**values, **gradients}

    return run


def _kl_scenarios() -> Iterator[Scenario]:
    shapes = [(1, 1), (7, 2), (2, 3, 33), (3, 4097), (2, 40_001), (0, 5)]
    options: tuple[dict[str, Any], ...] = ({}, {"temperature": 2.0}, {"softcap": 5.0, "label_penalty": 3.0})
    for shape, option in itertools.product(shapes, options):
        title = f"{list(shape)}{''.join(f', {n} {v}' for n, v in option.items())}"
        run = _token_kl(**option)
        yield Scenario("token_kl", title, _two_logits(shape), run, ulps=_ulps(shape), cancels=True)


def _two_logits(shape: tuple[int, ...]) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        student, teacher = _logits(shape)(generator), _logits(shape)(generator)
        return {**student, "teacher_logits": teacher["logits"]}

    return inputs


def _token_kl(**options: Any) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaf = x["logits"].requires_grad_()
        kl = library.token_kl(leaf, x["teacher_logits"], x["labels"], **options)
        (gradient,) = torch.autograd.grad(kl, leaf, x["grad"].to(kl.dtype))
        return {"value": kl, "grad of logits": gradient}

    return run


def _drop_in_scenarios() -> Iterator[Scenario]:
    for smoothing, reduction in itertools.product((0.0, 0.1), ("mean", "none")):
        title = f"[9, 1025], label smoothing {smoothing}, {reduction}"
        run = _cross_entropy(label_smoothing=smoothing, reduction=reduction)
        yield Scenario("cross_entropy", title, _logits((9, 1025)), run, ulps=16, cancels=True)
    for K in (0, 3):
        title, inputs = f"[9, 1025]{f', {K} columns' if K else ''}", _logits((9, 1025), ignore=False)
        yield Scenario("selective_log_softmax", title, inputs, _selected(K), ulps=16, cancels=True)


def _cross_entropy(**options: Any) -> Callable[[ModuleType, Tensors], Tensors]:
    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaf = x["logits"].requires_grad_()
        loss = library.cross_entropy(leaf, x["labels"], **options)
        return {"value": loss, "grad of logits": torch.autograd.grad(loss.sum(), leaf)[0]}

    return run


def _selected(K: int) -> Callable[[ModuleType, Tensors], Tensors]:
    """The label's column, or the K columns after it, round the end."""

    def run(library: ModuleType, x: Tensors) -> Tensors:
        leaf, index = x["logits"].requires_grad_(), x["labels"]
        if K:
            index = (index.unsqueeze(-1) + torch.arange(K, device=index.device)) % leaf.shape[-1]
        value = library.selective_log_softmax(leaf, index)
        return {"value": value, "grad of logits": torch.autograd.grad(value.sum(), leaf)[0]}

    return run
