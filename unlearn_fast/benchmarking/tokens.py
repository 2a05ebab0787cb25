"""The benchmark cases of the operators over rows of logits, and of FLAT."""

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

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def smallest() -> list[Case]:
    return [
        token_logprobs(6, 1000, FLOAT32),
        token_logprobs(6, 1000, FLOAT32, inplace=True),
        token_logprobs(6, 1000, BFLOAT16),
        token_logprobs(6, 1000, FLOAT32, softcap=30.0),
        token_statistics(6, 1000, FLOAT32),
        token_kl(6, 1000, FLOAT32),
        cross_entropy(6, 1000, FLOAT32),
        flat_loss(2, 9, 1000),
    ]


def full() -> list[Case]:
    return [
        token_logprobs(512, 32_000, FLOAT32),
        token_logprobs(512, 32_000, FLOAT32, inplace=True),
        token_logprobs(512, 32_000, BFLOAT16),
        token_logprobs(512, 32_000, BFLOAT16, inplace=True),
        token_logprobs(128, 128_256, FLOAT32, inplace=True),
        token_logprobs(128, 128_256, BFLOAT16, inplace=True),
        token_logprobs(128, 128_256, BFLOAT16, inplace=True, softcap=30.0),
        token_statistics(128, 128_256, FLOAT32),
        token_statistics(128, 128_256, BFLOAT16),
        token_kl(128, 128_256, FLOAT32),
        token_kl(128, 128_256, BFLOAT16),
        cross_entropy(128, 128_256, BFLOAT16),
        flat_loss(4, 65, 32_000),
    ]


def token_logprobs(N: int, V: int, dtype: torch.dtype, *, inplace: bool = False, softcap: float | None = None) -> Case:
    names = ("logits", "labels")
    eager = rivals.capped_token_logprobs if softcap else rivals.eager_token_logprobs
    released = {} if softcap else {"released softmax, NLL": forward_backward(rivals.released_token_logprobs, *names)}
    options = {"softcap": softcap} if softcap else {}
    variants = [f"softcap {softcap:g}"] if softcap else []
    return Case(
        operator="token_logprobs",
        shape=f"[{N}, {V}]",
        dtype=dtype,
        variant=", ".join(variants + ["in-place backward"] * inplace),
        inputs=lambda g: _rows(N, V, dtype, g),
        overwritten=("logits",) if inplace else (),
        ours=forward_backward(unlearn_fast.token_logprobs, *names, inplace_backward=inplace, **options),
        exact=in_float64(forward_backward(reference.token_logprobs, *names, **options)),
        rivals={
            "reference": forward_backward(reference.token_logprobs, *names, **options),
            "log_softmax, gather": forward_backward(eager, *names, **options),
            "torch.compile": forward_backward(compiled(eager), *names, **options),
            **released,
        },
        cost=Cost("forward reads the logits, backward reads them and writes as much", bytes=3 * N * V * dtype.itemsize),
    )


def _rows(N: int, V: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {
        "logits": normal(generator, N, V, dtype=dtype, requires_grad=True),
        "labels": torch.randint(V, (N,), generator=generator),
        "grad": normal(generator, N),
    }


def token_statistics(N: int, V: int, dtype: torch.dtype) -> Case:
    """log p and entropy, with a gradient of both."""
    return Case(
        operator="token_statistics",
        shape=f"[{N}, {V}]",
        dtype=dtype,
        inputs=lambda g: _rows(N, V, dtype, g),
        ours=_logp_and_entropy(unlearn_fast.token_statistics),
        exact=in_float64(_logp_and_entropy(reference.token_statistics)),
        rivals={
            "reference": _logp_and_entropy(reference.token_statistics),
            "log_softmax, gather, sum": _logp_and_entropy(rivals.eager_token_statistics),
            "torch.compile": _logp_and_entropy(compiled(rivals.eager_token_statistics)),
        },
        cost=Cost("as token_logprobs", bytes=3 * N * V * dtype.itemsize),
    )


def _logp_and_entropy(function: Any) -> Run:
    def run(x: Inputs) -> Results:
        result = function(x["logits"], x["labels"])
        values = result.logp, result.entropy
        return *values, *torch.autograd.grad(values, x["logits"], (x["grad"], x["grad"]))

    return run


def token_kl(N: int, V: int, dtype: torch.dtype) -> Case:
    names = ("logits", "teacher_logits")
    return Case(
        operator="token_kl",
        shape=f"[{N}, {V}]",
        dtype=dtype,
        inputs=lambda g: {**_rows(N, V, dtype, g), "teacher_logits": normal(g, N, V, dtype=dtype)},
        ours=forward_backward(unlearn_fast.token_kl, *names),
        exact=in_float64(forward_backward(reference.token_kl, *names)),
        rivals={
            "reference": forward_backward(reference.token_kl, *names),
            "kl_div of log_softmaxes": forward_backward(rivals.eager_token_kl, *names),
            "torch.compile": forward_backward(compiled(rivals.eager_token_kl), *names),
        },
        cost=Cost("forward reads both logits, backward reads both, writes one", bytes=5 * N * V * dtype.itemsize),
    )


def cross_entropy(N: int, V: int, dtype: torch.dtype) -> Case:
    """With label smoothing, on logits of which an ordinary training step needs the mean loss."""
    names = ("logits", "labels")
    smoothed = {"label_smoothing": 0.1}
    return Case(
        operator="cross_entropy",
        shape=f"[{N}, {V}]",
        dtype=dtype,
        variant="label smoothing 0.1",
        inputs=lambda g: {name: x for name, x in _rows(N, V, dtype, g).items() if name != "grad"},
        ours=forward_backward(unlearn_fast.cross_entropy, *names, **smoothed),
        exact=in_float64(forward_backward(reference.cross_entropy, *names, **smoothed)),
        rivals={
            "torch.nn.functional": forward_backward(torch.nn.functional.cross_entropy, *names, **smoothed),
            "torch.compile": forward_backward(compiled(torch.nn.functional.cross_entropy), *names, **smoothed),
        },
        cost=Cost("as token_logprobs", bytes=3 * N * V * dtype.itemsize),
    )


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
