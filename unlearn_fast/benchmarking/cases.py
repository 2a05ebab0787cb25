"""Every benchmark case, for the command and for `benchmarks/`: ours, its rivals, and what the work costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import unlearn_fast
from unlearn_fast import reference
from unlearn_fast.benchmarking import rivals
from unlearn_fast.benchmarking.case import (
    Case,
    Cost,
    Inputs,
    Results,
    Run,
    compiled,
    forward_backward,
    in_float64,
    normal,
)
from unlearn_fast.benchmarking.gpt import GPT, forward_flops, next_token_losses

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def smallest() -> list[Case]:
    """Seconds for all of them; large enough for every code path, too small for the timings to mean much."""
    return [
        token_logprobs(6, 1000, FLOAT32),
        token_logprobs(6, 1000, FLOAT32, inplace=True),
        token_logprobs(6, 1000, BFLOAT16),
        linear_token_logprobs(12, 16, 1000),
        sum_grad_squared_linear(2, 8, 16, 24),
        sum_grad_squared_conv(2, 3, 8, size=9, kernel=3, stride=2),
        dampen(20_000, share=0.5),
        dampen(20_000, share=0.001),
        flat_loss(2, 9, 1000),
        diagonal_fisher(batches=2, B=2, T=8, width=16, layers=1, vocabulary=50),
    ]


def full() -> list[Case]:
    """The standard shapes."""
    return [
        token_logprobs(512, 32_000, FLOAT32),
        token_logprobs(512, 32_000, FLOAT32, inplace=True),
        token_logprobs(512, 32_000, BFLOAT16),
        token_logprobs(512, 32_000, BFLOAT16, inplace=True),
        linear_token_logprobs(1024, 1024, 32_000),
        sum_grad_squared_linear(8, 128, 512, 1536),
        sum_grad_squared_linear(256, None, 1024, 1024),
        sum_grad_squared_conv(32, 64, 64, size=32, kernel=3),
        sum_grad_squared_conv(32, 512, 512, size=4, kernel=3),
        dampen(32_000_000, share=0.5),
        dampen(32_000_000, share=0.001),
        flat_loss(4, 65, 32_000),
        diagonal_fisher(batches=8, B=8, T=128, width=256, layers=3, vocabulary=1024),
    ]


def operators() -> list[str]:
    return list(dict.fromkeys(case.operator for case in full()))


def find(name: str) -> Case:
    """The case of that name."""
    return next(case for case in smallest() + full() if case.name == name)


def token_logprobs(N: int, V: int, dtype: torch.dtype, *, inplace: bool = False) -> Case:
    names = ("logits", "labels")
    return Case(
        operator="token_logprobs",
        shape=f"[{N}, {V}]",
        dtype=dtype,
        variant="in-place backward" if inplace else "",
        inputs=lambda g: {
            "logits": normal(g, N, V, dtype=dtype, requires_grad=True),
            "labels": torch.randint(V, (N,), generator=g),
            "grad": normal(g, N),
        },
        overwritten=("logits",) if inplace else (),
        ours=forward_backward(unlearn_fast.token_logprobs, *names, inplace_backward=inplace),
        exact=in_float64(forward_backward(reference.token_logprobs, *names)),
        rivals={
            "reference": forward_backward(reference.token_logprobs, *names),
            "log_softmax, gather": forward_backward(rivals.eager_token_logprobs, *names),
            "torch.compile": forward_backward(compiled(rivals.eager_token_logprobs), *names),
        },
        cost=Cost("forward reads the logits, backward reads them and writes as much", bytes=3 * N * V * dtype.itemsize),
    )


def linear_token_logprobs(N: int, H: int, V: int) -> Case:
    names = ("hidden", "weight", "labels")
    return Case(
        operator="linear_token_logprobs",
        shape=f"[{N}, {H}] x [{V}, {H}]",
        dtype=FLOAT32,
        inputs=lambda g: {
            "hidden": normal(g, N, H, requires_grad=True),
            "weight": (normal(g, V, H) / H**0.5).requires_grad_(),
            "labels": torch.randint(V, (N,), generator=g),
            "grad": normal(g, N),
        },
        ours=forward_backward(_ours_linear, *names),
        exact=in_float64(forward_backward(_reference_linear, *names)),
        rivals={
            "reference": forward_backward(_reference_linear, *names),
            "torch.compile": forward_backward(compiled(rivals.eager_linear_token_logprobs), *names),
        },
        cost=Cost("three products: logits, gradients of hidden and weight: 6 N H V", flops=6 * N * H * V),
    )


def _ours_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return unlearn_fast.linear_token_logprobs(hidden, weight, labels)


def _reference_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return reference.linear_token_logprobs(hidden, weight, labels)


def sum_grad_squared_linear(B: int, T: int | None, I: int, O: int) -> Case:  # noqa: E741
    """T None: one position an example, and no axis for it."""
    leading = (B,) if T is None else (B, T)
    einsum = rivals.einsum_product_of_squares_ if T is None else rivals.einsum_sum_grad_squared_
    return Case(
        operator="sum_grad_squared_linear_",
        shape=f"B {B}, {I} -> {O}" if T is None else f"B {B}, T {T}, {I} -> {O}",
        dtype=FLOAT32,
        inputs=lambda g: {
            "out": normal(g, O, I).square(),
            "inputs": normal(g, *leading, I),
            "grad_outputs": normal(g, *leading, O),
        },
        overwritten=("out",),
        ours=_in_place(unlearn_fast.sum_grad_squared_linear_),
        exact=in_float64(_in_place(reference.sum_grad_squared_linear_)),
        rivals={
            "reference": _in_place(reference.sum_grad_squared_linear_),
            "einsum": _in_place(einsum),
            "torch.compile": _in_place(compiled(einsum)),
        },
        yardsticks={"ordinary weight gradient": _in_place(rivals.weight_gradient_)},
        cost=Cost("the ordinary weight gradient: 2 B T I O", flops=2 * B * (T or 1) * I * O),
    )


def sum_grad_squared_conv(B: int, C: int, O: int, *, size: int, kernel: int, stride: int = 1) -> Case:  # noqa: E741
    """Square images and kernels, padded by half the kernel."""
    padding = kernel // 2
    positions = (size + 2 * padding - kernel) // stride + 1
    settings = {"stride": stride, "padding": padding}
    return Case(
        operator="sum_grad_squared_conv_",
        shape=f"B {B}, {C} -> {O}, {size}x{size}, kernel {kernel}, stride {stride}",
        dtype=FLOAT32,
        inputs=lambda g: {
            "out": normal(g, O, C, kernel, kernel).square(),
            "inputs": normal(g, B, C, size, size),
            "grad_outputs": normal(g, B, O, positions, positions),
        },
        overwritten=("out",),
        ours=_in_place(unlearn_fast.sum_grad_squared_conv_, **settings),
        exact=in_float64(_in_place(reference.sum_grad_squared_conv_, **settings)),
        rivals={
            "reference": _in_place(reference.sum_grad_squared_conv_, **settings),
            "unfold, einsum": _in_place(rivals.unfolded_sum_grad_squared_, **settings),
            "torch.compile": _in_place(compiled(rivals.unfolded_sum_grad_squared_), **settings),
        },
        yardsticks={"ordinary weight gradient": _in_place(rivals.convolution_weight_gradient_, **settings)},
        cost=Cost(
            "the ordinary weight gradient: 2 B positions C O kernel",
            flops=2 * B * positions**2 * C * O * kernel**2,
        ),
    )


def _in_place(function: Callable[..., Any], **settings: Any) -> Run:
    def run(x: Inputs) -> Results:
        function(x["out"], x["inputs"], x["grad_outputs"], **settings)
        return (x["out"],)

    return run


def dampen(P: int, *, share: float) -> Case:
    """Selects about `share` of the parameters, spread evenly."""
    return Case(
        operator="dampen_",
        shape=f"[{P}]",
        dtype=FLOAT32,
        variant=f"{share:g} selected",
        inputs=lambda g: _importances(P, share, g),
        overwritten=("params",),
        ours=_dampened(_ours_dampen_),
        exact=_dampened(_reference_dampen_),  # in float32, as released: float64 would select others at the threshold
        rivals={
            "reference": _dampened(_reference_dampen_),
            "torch.compile": _dampened(compiled(rivals.where_dampen_)),
            "released loop": _dampened(rivals.released_dampen_),
        },
        cost=Cost(
            "f and r read; p read and written in the 64-byte lines where a value is selected",
            bytes=int(8 * P * (2 - (1 - share) ** 16)),
        ),
    )


def _importances(P: int, share: float, generator: torch.Generator) -> Inputs:
    """f / r is uniform around the threshold alpha = 2, with `share` above it."""
    reference = torch.rand(P, generator=generator).add_(0.1)
    ratio = torch.rand(P, generator=generator).add_(1 + share)
    return {"params": normal(generator, P), "forget": ratio.mul_(reference), "reference": reference}


def _dampened(function: Callable[..., Any]) -> Run:
    def run(x: Inputs) -> Results:
        function(x["params"], x["forget"], x["reference"], alpha=2.0, lam=1.0)
        return (x["params"],)

    return run


def _ours_dampen_(p: Tensor, f: Tensor, r: Tensor, *, alpha: float, lam: float) -> None:
    unlearn_fast.dampen_([p], [f], [r], alpha=alpha, lam=lam)


def _reference_dampen_(p: Tensor, f: Tensor, r: Tensor, *, alpha: float, lam: float) -> None:
    reference.dampen_([p], [f], [r], alpha=alpha, lam=lam)


def flat_loss(B: int, T: int, V: int) -> Case:
    """Template and forget answers of T tokens each; a quarter of the positions is unlabelled, as prompts are."""
    names = ("template_logits", "template_labels", "forget_logits", "forget_labels")
    return Case(
        operator="flat_loss",
        shape=f"2 x [{B}, {T}, {V}]",
        dtype=FLOAT32,
        variant="released formulation",
        inputs=lambda g: dict(zip(names, (*_answer(B, T, V, g), *_answer(B, T, V, g)), strict=True)),
        ours=forward_backward(unlearn_fast.flat_loss, *names, formulation="official"),
        exact=in_float64(forward_backward(reference.flat_loss, *names, formulation="official")),
        rivals={
            "reference": forward_backward(reference.flat_loss, *names, formulation="official"),
            "torch.compile": forward_backward(compiled(rivals.released_flat_loss), *names),
            "released": forward_backward(rivals.released_flat_loss, *names),
        },
        cost=Cost("as token_logprobs, for both sides: 3 * 2 B T V values", bytes=3 * 2 * B * T * V * 4),
    )


def _answer(B: int, T: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(V, (B, T), generator=generator)
    labels[:, : T // 4] = -100
    return normal(generator, B, T, V, requires_grad=True), labels


def diagonal_fisher(*, batches: int, B: int, T: int, width: int, layers: int, vocabulary: int) -> Case:
    """A pre-norm GPT with tied embeddings."""
    return Case(
        operator="diagonal_fisher",
        shape=f"GPT d {width}, {layers} layers, V {vocabulary}; {batches} batches of [{B}, {T}]",
        dtype=FLOAT32,
        inputs=lambda g: {
            "model": _model(vocabulary, width, layers, T, g),
            "batches": list(torch.randint(vocabulary, (batches, B, T), generator=g)),
        },
        ours=_ours_fisher,
        exact=in_float64(_over_batches(rivals.one_example_fisher)),
        rivals={"one-example loop": _over_batches(rivals.one_example_fisher)},
        yardsticks={
            "ordinary forward, backward": _over_batches(rivals.ordinary_gradients),
            "released batch form": _over_batches(rivals.released_fisher),
        },
        cost=Cost(
            "matrix products of the forward and of two in the backward",
            flops=3 * batches * forward_flops(vocabulary, width, layers, B, T),
        ),
    )


def _model(vocabulary: int, width: int, layers: int, positions: int, generator: torch.Generator) -> GPT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        return GPT(vocabulary, width, layers, heads=max(1, width // 64), positions=positions)


def _ours_fisher(x: Inputs) -> Results:
    importance = unlearn_fast.diagonal_fisher(x["model"], x["batches"], next_token_losses, progress=False)
    return tuple(importance.values())


def _over_batches(function: Callable[..., Results]) -> Run:
    return lambda x: function(x["model"], x["batches"], next_token_losses)
