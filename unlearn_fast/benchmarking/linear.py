"""The cases of losses from hidden states and the lm_head: their yardstick is the three matrix products alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    forward_backward,
    in_float64,
    normal,
)


@dataclass(frozen=True)
class LossCase(Case):
    """Errors are of whole tensors, in norm: a 16-bit gradient of the weight has elements that cancel nearly to 0, next
    to which the rounding of their terms is large."""

    def verdict(self, entrant: Entrant, results: Results, exact: Results) -> Verdict:
        wrong_by = max(_error_in_norm(*pair) for pair in zip(results, exact, strict=True))
        allowed = TOLERANCE[self.dtype]
        return Verdict(wrong_by, "" if wrong_by <= allowed else f"wrong by {wrong_by:.1e}, allowed is {allowed:.0e}")


def _error_in_norm(result: Tensor | None, exact: Tensor | None) -> float:
    if result is None or exact is None or result.shape != exact.shape:
        return float("inf")
    error = (result.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm()
    return error.nan_to_num(nan=float("inf")).item()


def linear_flat_loss(B: int, T: int, H: int, V: int, dtype: torch.dtype) -> Case:
    """Template and forget answers of T tokens each, all but the first of them labelled."""
    sides = ("template_hidden", "template_labels", "forget_hidden", "forget_labels")
    return _case(
        "linear_flat_loss",
        f"2 x [{B}, {T}, {H}] x [{V}, {H}]",
        dtype,
        2 * B * (T - 1),
        H,
        V,
        inputs=lambda g: {
            "template_hidden": normal(g, B, T, H, dtype=dtype, requires_grad=True),
            "template_labels": torch.randint(V, (B, T), generator=g),
            "forget_hidden": normal(g, B, T, H, dtype=dtype, requires_grad=True),
            "forget_labels": torch.randint(V, (B, T), generator=g),
        },
        ours=forward_backward(_ours_flat, *sides, "weight"),
        specified=forward_backward(_reference_flat, *sides, "weight"),
        others={"chunked torch": forward_backward(rivals.chunked_linear_flat_loss, *sides, "weight")},
    )


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
            "labels": torch.randint(V, (N,), generator=g),
        },
        ours=forward_backward(_ours_cross_entropy, *names),
        specified=forward_backward(_reference_cross_entropy, *names),
        others=others,
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
    )


def _ours_flat(*arguments: Tensor) -> Tensor:
    return unlearn_fast.linear_flat_loss(*arguments)


def _reference_flat(*arguments: Tensor) -> Tensor:
    return reference.linear_flat_loss(*arguments)


def _ours_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return unlearn_fast.linear_cross_entropy(hidden, weight, labels)


def _reference_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return reference.linear_cross_entropy(hidden, weight, labels)
