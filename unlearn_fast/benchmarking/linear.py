"""The cases of losses from hidden states and the lm_head: their yardstick is the three matrix products alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import unlearn_fast
from unlearn_fast import reference
from unlearn_fast.benchmarking import rivals
from unlearn_fast.benchmarking.case import (
    TOLERANCE,
    Case,
    Cost,
    Entrant,
    Inputs,
    Results,
    Run,
    Verdict,
    compiled,
    forward_backward,
    in_float64,
    integers,
    normal,
)

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SIDES = ("template_hidden", "template_labels", "forget_hidden", "forget_labels")


def smallest() -> list[Case]:
    return [
        linear_flat_loss(2, 9, 16, 1000, FLOAT32),
        linear_cross_entropy(12, 16, 1000, FLOAT32),
        linear_token_logprobs(12, 16, 1000),
    ]


def full() -> list[Case]:
    return [
        *(linear_flat_loss(8, 129, 1024, 50_257, dtype) for dtype in (FLOAT32, BFLOAT16)),
        *(linear_cross_entropy(2048, 1024, 50_257, dtype) for dtype in (FLOAT32, BFLOAT16)),
        linear_token_logprobs(1024, 1024, 32_000),
    ]


def on_gpu() -> list[Case]:
    N, H, V = 8192, 4096, 128_256
    libraries = {
        "Liger": forward_backward(rivals.liger_linear_cross_entropy, "hidden", "weight", "labels"),
        "Cut Cross-Entropy": forward_backward(rivals.cut_cross_entropy, "hidden", "weight", "labels"),
    }
    return [
        linear_flat_loss(8, N // 16 + 1, H, V, BFLOAT16),
        replace(linear_cross_entropy(N, H, V, BFLOAT16), libraries=libraries),
        linear_token_logprobs(N, H, V, BFLOAT16),
    ]


@dataclass(frozen=True)
class LossCase(Case):
    """Errors are of whole tensors, in norm: a 16-bit gradient of the weight has elements that cancel nearly to 0, next
    to which the rounding of their terms is large."""

    logits_bytes: int = 0  # of all rows
    result_bytes: int = 0  # of the gradients, which every implementation gives

    def verdict(self, entrant: Entrant, results: Results, exact: Results) -> Verdict:
        wrong_by = max(error_in_norm(*pair) for pair in zip(results, exact, strict=True))
        allowed = TOLERANCE[self.dtype]
        return Verdict(wrong_by, "" if wrong_by <= allowed else f"wrong by {wrong_by:.1e}, allowed is {allowed:.0e}")

    def facts(self) -> dict[str, Any]:
        return {"logits_bytes": self.logits_bytes, "result_bytes": self.result_bytes}

    def remarks(self, peaks: Mapping[str, int]) -> list[str]:
        beyond = {name: peak - self.result_bytes for name, peak in peaks.items()}
        told = (f"{name} {size >> 20} MiB ({size / self.logits_bytes:.1%})" for name, size in beyond.items())
        return [f"memory beyond the gradients (and over that of all logits): {', '.join(told)}"] if beyond else []


def error_in_norm(result: Tensor | None, exact: Tensor | None) -> float:
    if result is None or exact is None or result.shape != exact.shape:
        return float("inf")
    error = (result.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm()
    return error.nan_to_num(nan=float("inf")).item()


def linear_flat_loss(B: int, T: int, H: int, V: int, dtype: torch.dtype) -> Case:
    """Template and forget answers of T tokens each, all but the first of them labelled."""
    others = {"chunked torch": rivals.chunked_linear_flat_loss}
    return _flat_case("linear_flat_loss", B, T, H, V, dtype, others)


def flat_memory(B: int, T: int, H: int, V: int, dtype: torch.dtype) -> Case:
    """The released FLAT of hidden states: each implementation makes the logits, as many as it needs."""
    others: dict[str, Callable[..., Tensor]] = {
        "ours, from logits": partial(_of_logits, _our_flat_loss),
        "torch.compile": compiled(partial(_of_logits, rivals.released_flat_loss)),
        "released": partial(_of_logits, rivals.released_flat_loss),
    }
    return _flat_case("flat_memory", B, T, H, V, dtype, others, formulation="official")


def _flat_case(
    operator: str,
    B: int,
    T: int,
    H: int,
    V: int,
    dtype: torch.dtype,
    others: Mapping[str, Callable[..., Tensor]],
    **options: Any,
) -> Case:
    names = (*SIDES, "weight")
    return _case(
        operator,
        f"2 x [{B}, {T}, {H}] x [{V}, {H}]",
        dtype,
        2 * B * (T - 1),
        H,
        V,
        inputs=lambda g: _answers(B, T, H, V, dtype, g),
        ours=forward_backward(unlearn_fast.linear_flat_loss, *names, **options),
        specified=forward_backward(reference.linear_flat_loss, *names, **options),
        others={name: forward_backward(function, *names) for name, function in others.items()},
    )


def _answers(B: int, T: int, H: int, V: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    def hidden() -> Tensor:
        return normal(generator, B, T, H, dtype=dtype, requires_grad=True)

    def labels() -> Tensor:
        return integers(generator, V, B, T)

    return dict(zip(SIDES, (hidden(), labels(), hidden(), labels()), strict=True))


def _of_logits(
    loss: Any,
    template_hidden: Tensor,
    template_labels: Tensor,
    forget_hidden: Tensor,
    forget_labels: Tensor,
    weight: Tensor,
) -> Tensor:
    return loss(linear(template_hidden, weight), template_labels, linear(forget_hidden, weight), forget_labels)


def _our_flat_loss(*arguments: Tensor) -> Tensor:
    return unlearn_fast.flat_loss(*arguments, formulation="official", inplace_backward=True)


def linear_cross_entropy(N: int, H: int, V: int, dtype: torch.dtype) -> Case:
    names = ("hidden", "weight", "labels")
    others = {"chunked torch": forward_backward(rivals.chunked_linear_cross_entropy, *names)}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):  # from torch 2.13 on
        others["torch's"] = forward_backward(rivals.torchs_linear_cross_entropy, *names)
    return _case(
        "linear_cross_entropy",
        f"[{N}, {H}] x [{V}, {H}]",
        dtype,
        N,
        H,
        V,
        inputs=lambda g: {
            "hidden": normal(g, N, H, dtype=dtype, requires_grad=True),
            "labels": integers(g, V, N),
        },
        ours=forward_backward(unlearn_fast.linear_cross_entropy, *names),
        specified=forward_backward(reference.linear_cross_entropy, *names),
        others=others,
    )


def linear_token_logprobs(N: int, H: int, V: int, dtype: torch.dtype = FLOAT32) -> Case:
    names = ("hidden", "weight", "labels")
    return _case(
        "linear_token_logprobs",
        f"[{N}, {H}] x [{V}, {H}]",
        dtype,
        N,
        H,
        V,
        inputs=lambda g: {
            "hidden": normal(g, N, H, dtype=dtype, requires_grad=True),
            "labels": integers(g, V, N),
            "grad": normal(g, N),
        },
        ours=forward_backward(unlearn_fast.linear_token_logprobs, *names),
        specified=forward_backward(reference.linear_token_logprobs, *names),
        others={"torch.compile": forward_backward(compiled(rivals.eager_linear_token_logprobs), *names)},
    )


def _case(
    operator: str,
    shape: str,
    dtype: torch.dtype,
    N: int,
    H: int,
    V: int,
    *,
    inputs: Any,
    ours: Run,
    specified: Run,
    others: dict[str, Run],
) -> Case:
    def with_weight(g: torch.Generator) -> Inputs:
        return {"weight": (normal(g, V, H) / H**0.5).to(dtype).requires_grad_(), **inputs(g)}

    def products(x: Inputs) -> Results:
        """Of as many rows as the loss has, N, and nothing between them."""
        hidden = torch.cat([t.detach().flatten(0, -2) for name, t in x.items() if name.endswith("hidden")])[:N]
        logits = hidden @ x["weight"].detach().T
        return logits @ x["weight"].detach(), logits.T @ hidden

    return LossCase(
        operator=operator,
        shape=shape,
        dtype=dtype,
        inputs=with_weight,
        ours=ours,
        exact=in_float64(specified),
        rivals={"reference": specified, **others},
        yardsticks={"three bare products": products},
        cost=Cost("three products: logits, gradients of hidden and weight: 6 N H V", flops=6 * N * H * V),
        logits_bytes=N * V * dtype.itemsize,
        result_bytes=(N + V) * H * dtype.itemsize,
    )
