"""Every benchmark case, for the command and for `benchmarks/`: ours, its rivals, and what the work costs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import unlearn_fast
from unlearn_fast import reference
from unlearn_fast.benchmarking import dampening, end_to_end, fisher, linear, rivals, tokens
from unlearn_fast.benchmarking.case import (
    Case,
    Cost,
    Inputs,
    Results,
    Run,
    compiled,
    in_float64,
    normal,
)

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def smallest() -> list[Case]:
    """Seconds for all of them; large enough for every code path, too small for the timings to mean much."""
    return [
        *tokens.smallest(),
        *linear.smallest(),
        sum_grad_squared_linear(2, 8, 16, 24),
        sum_grad_squared_embedding(2, 40, 16, 30),
        sum_grad_squared_scale(3, 40, 16),
        sum_grad_squared_scale(3, 40, 16, channels_first=True),
        sum_grad_squared_conv(2, 3, 8, size=9, kernel=3, stride=2),
        *dampening.smallest(),
        *fisher.smallest(),
        *end_to_end.smallest(),
    ]


def full() -> list[Case]:
    """The standard shapes."""
    return [
        *tokens.full(),
        *linear.full(),
        sum_grad_squared_linear(8, 128, 512, 1536),
        sum_grad_squared_embedding(16, 512, 768, 50_257),
        sum_grad_squared_scale(16, 512, 1024),
        sum_grad_squared_scale(32, 784, 256, channels_first=True),
        sum_grad_squared_linear(256, None, 1024, 1024),
        sum_grad_squared_conv(32, 64, 64, size=32, kernel=3),
        sum_grad_squared_conv(32, 512, 512, size=4, kernel=3),
        *dampening.full(),
        *fisher.full(),
        *end_to_end.full(),
    ]


def on_gpu() -> list[Case]:
    """The standard shapes there, in the order of what they decide: a run may be cut off. About 3 minutes of an H200."""
    return [
        *linear.on_gpu(),
        sum_grad_squared_linear(64, 128, 1024, 4096, BFLOAT16),
        sum_grad_squared_linear(16, 1024, 4096, 4096, BFLOAT16),
        *end_to_end.on_gpu(),
        *fisher.on_gpu(),
        *dampening.on_gpu(),
        *tokens.on_gpu(),
        sum_grad_squared_linear(32, 197, 768, 3072),
        sum_grad_squared_embedding(16, 1024, 2048, 128_256, BFLOAT16),
        sum_grad_squared_scale(32, 197, 768),
        sum_grad_squared_conv(256, 64, 64, size=32, kernel=3),
    ]


def on(device: str, *, quick: bool = False) -> list[Case]:
    """The cases of a device."""
    if device == "cpu":
        return smallest() if quick else full()
    return [dataclasses.replace(case, device=device) for case in (smallest() if quick else on_gpu())]


def operators() -> list[str]:
    return list(dict.fromkeys(case.operator for case in full()))


def find(name: str) -> Case:
    """The case of that name on the CPU, those whose memory is measured with another included."""
    listed = smallest() + full()
    return next(case for case in [*listed, *(w for case in listed for w in case.weighed())] if case.name == name)


def sum_grad_squared_linear(B: int, T: int | None, I: int, O: int, dtype: torch.dtype = FLOAT32) -> Case:  # noqa: E741
    """T None: one position an example, and no axis for it."""
    leading = (B,) if T is None else (B, T)
    einsum = rivals.einsum_product_of_squares_ if T is None else rivals.einsum_sum_grad_squared_
    return Case(
        operator="sum_grad_squared_linear_",
        shape=f"B {B}, {I} -> {O}" if T is None else f"B {B}, T {T}, {I} -> {O}",
        dtype=dtype,
        inputs=lambda g: {
            "out": normal(g, O, I).square(),
            "inputs": normal(g, *leading, I, dtype=dtype),
            "grad_outputs": normal(g, *leading, O, dtype=dtype),
        },
        overwritten=("out",),
        ours=_in_place(unlearn_fast.sum_grad_squared_linear_),
        exact=in_float64(_in_place(reference.sum_grad_squared_linear_)),
        rivals={
            "reference": _in_place(reference.sum_grad_squared_linear_),
            "einsum": _in_place(einsum),
            "torch.compile": _in_place(compiled(einsum)),
        },
        yardsticks={"ordinary weight gradient": lambda x: (rivals.weight_gradient(x["inputs"], x["grad_outputs"]),)},
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


def sum_grad_squared_embedding(B: int, T: int, H: int, V: int, dtype: torch.dtype = FLOAT32) -> Case:
    """Tokens as frequent as words are: the n-th most frequent one 1 / n times as often as the first."""
    frequency = 1 / torch.arange(1, V + 1)

    def inputs(g: torch.Generator) -> Inputs:
        words = torch.randperm(V, generator=g, device=g.device)
        return {
            "out": normal(g, V, H).square(),
            "inputs": words[torch.multinomial(frequency.to(g.device), B * T, True, generator=g).view(B, T)],
            "grad_outputs": normal(g, B, T, H, dtype=dtype),
        }

    distinct = V - (1 - frequency / frequency.sum()).pow(B * T).sum().item()  # expected
    return Case(
        operator="sum_grad_squared_embedding_",
        shape=f"B {B}, T {T}, [{V}, {H}]",
        dtype=dtype,
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
            bytes=int((B * T * dtype.itemsize + 2 * distinct * 4) * H),
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
