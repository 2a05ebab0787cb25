"""Every benchmark case, for the command and for `benchmarks/`: ours, its rivals, and what the work costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import unlearn_fast
from unlearn_fast import reference
from unlearn_fast.benchmarking import fisher, linear, rivals
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

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def smallest() -> list[Case]:
    """Seconds for all of them; large enough for every code path, too small for the timings to mean much."""
    return [
        token_logprobs(6, 1000, FLOAT32),
        token_logprobs(6, 1000, FLOAT32, inplace=True),
        token_logprobs(6, 1000, BFLOAT16),
        linear_token_logprobs(12, 16, 1000),
        sum_grad_squared_linear(2, 8, 16, 24),
        sum_grad_squared_embedding(2, 40, 16, 30),
        sum_grad_squared_scale(3, 40, 16),
        sum_grad_squared_scale(3, 40, 16, channels_first=True),
        sum_grad_squared_conv(2, 3, 8, size=9, kernel=3, stride=2),
        dampen(20_000, share=0.5),
        dampen(20_000, share=0.001),
        flat_loss(2, 9, 1000),
        linear.linear_flat_loss(2, 9, 16, 1000, FLOAT32),
        linear.linear_cross_entropy(12, 16, 1000, FLOAT32),
        *fisher.smallest(),
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
        sum_grad_squared_embedding(16, 512, 768, 50_257),
        sum_grad_squared_scale(16, 512, 1024),
        sum_grad_squared_scale(32, 784, 256, channels_first=True),
        sum_grad_squared_linear(256, None, 1024, 1024),
        sum_grad_squared_conv(32, 64, 64, size=32, kernel=3),
        sum_grad_squared_conv(32, 512, 512, size=4, kernel=3),
        dampen(32_000_000, share=0.5),
        dampen(32_000_000, share=0.001),
        flat_loss(4, 65, 32_000),
        *(linear.linear_flat_loss(8, 129, 1024, 50_257, dtype) for dtype in (FLOAT32, BFLOAT16)),
        *(linear.linear_cross_entropy(2048, 1024, 50_257, dtype) for dtype in (FLOAT32, BFLOAT16)),
        *fisher.full(),
    ]


def operators() -> list[str]:
    return list(dict.fromkeys(case.operator for case in full()))


def find(name: str) -> Case:
    """The case of that name, those whose memory is measured with another included."""
    listed = smallest() + full()
    return next(case for case in [*listed, *(w for case in listed for w in case.weighed())] if case.name == name)


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


def sum_grad_squared_embedding(B: int, T: int, H: int, V: int) -> Case:
    """Tokens as frequent as words are: the n-th most frequent one 1 / n times as often as the first."""
    frequency = 1 / torch.arange(1, V + 1)

    def inputs(g: torch.Generator) -> Inputs:
        return {
            "out": normal(g, V, H).square(),
            "inputs": torch.randperm(V, generator=g)[torch.multinomial(frequency, B * T, True, generator=g).view(B, T)],
            "grad_outputs": normal(g, B, T, H),
        }

    distinct = V - (1 - frequency / frequency.sum()).pow(B * T).sum().item()  # expected
    return Case(
        operator="sum_grad_squared_embedding_",
        shape=f"B {B}, T {T}, [{V}, {H}]",
        dtype=FLOAT32,
        inputs=inputs,
        overwritten=("out",),
        ours=_in_place(unlearn_fast.sum_grad_squared_embedding_),
        exact=in_float64(_in_place(reference.sum_grad_squared_embedding_)),
        rivals={
            "reference": _in_place(reference.sum_grad_squared_embedding_),
            "unique, index_add_": _in_place(rivals.unique_sum_grad_squared_embedding_),
            "torch.compile": _in_place(compiled(rivals.sorted_sum_grad_squared_embedding_)),
        },
        cost=Cost(
            "the gradients read, each row that occurs read and written: about (B T + 2 rows) H values",
            bytes=int((B * T + 2 * distinct) * H * 4),
        ),
    )


def sum_grad_squared_scale(B: int, T: int, C: int, *, channels_first: bool = False) -> Case:
    def values(g: torch.Generator) -> Tensor:
        return normal(g, B, C, T).transpose(1, 2) if channels_first else normal(g, B, T, C)

    return Case(
        operator="sum_grad_squared_scale_",
        shape=f"[{B}, {T}, {C}]",
        dtype=FLOAT32,
        variant="channels first" if channels_first else "",
        inputs=lambda g: {"out": normal(g, C).square(), "inputs": values(g), "grad_outputs": values(g)},
        overwritten=("out",),
        ours=_in_place(unlearn_fast.sum_grad_squared_scale_),
        exact=in_float64(_in_place(reference.sum_grad_squared_scale_)),
        rivals={
            "reference": _in_place(reference.sum_grad_squared_scale_),
            "sum, square, sum": _in_place(rivals.sum_square_sum_),
            "torch.compile": _in_place(compiled(rivals.sum_square_sum_)),
        },
        cost=Cost("inputs and gradients read once", bytes=2 * B * T * C * 4),
    )


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
