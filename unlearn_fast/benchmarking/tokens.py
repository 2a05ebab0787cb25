"""The benchmark cases of the operators over rows of logits, and of FLAT."""

import dataclasses
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
    by_rows,
    compiled,
    forward_backward,
    in_float64,
    integers,
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


def on_gpu() -> list[Case]:
    N, sizes = 8192, (32_000, 128_256, 151_936, 262_144)
    return [
        *(way(N, V, BFLOAT16) for V in sizes for way in (forward, backward)),
        _with_libraries(cross_entropy(N, 128_256, BFLOAT16)),
        token_kl(N // 2, 128_256, BFLOAT16),
        *(way(N, V, FLOAT32) for V in sizes for way in (forward, backward)),
        token_kl(N // 2, 128_256, FLOAT32),
        token_logprobs(N, 128_256, BFLOAT16, inplace=True),
        token_statistics(N, 128_256, BFLOAT16),
    ]


def forward(N: int, V: int, dtype: torch.dtype) -> Case:
    """Of token_logprobs, alone."""
    names = ("logits", "labels")

    def run(function: Any) -> Run:
        def values(x: Inputs) -> Results:
            with torch.no_grad():
                return (function(x["logits"], x["labels"]),)

        return values

    return Case(
        operator="token_logprobs",
        shape=f"[{N}, {V}]",
        dtype=dtype,
        variant="forward",
        inputs=lambda g: _rows(N, V, dtype, g),
        ours=run(unlearn_fast.token_logprobs),
        exact=by_rows(in_float64(run(reference.token_logprobs)), *names),
        rivals={
            "log_softmax, gather": run(rivals.eager_token_logprobs),
            "torch.compile": run(compiled(rivals.eager_token_logprobs)),
        },
        cost=Cost("the logits read once", bytes=N * V * dtype.itemsize),
    )


def backward(N: int, V: int, dtype: torch.dtype) -> Case:
    """Of token_logprobs, alone, into memory of its own: what the forward keeps is among the inputs."""
    saved = ("logp", "row_max", "log_sum")

    def inputs(g: torch.Generator) -> Inputs:
        x = _rows(N, V, dtype, g)
        x["logits"] = x["logits"].detach()
        kept = torch.ops.unlearn_fast.token_logprobs(x["logits"], x["labels"], -100, 0.0, 1.0, False)
        return x | dict(zip(saved, kept, strict=False)) | {"entropy": kept[0].new_empty(0)}

    def ours(x: Inputs) -> Results:
        kept = (x["logits"], x["labels"], *(x[name] for name in saved), x["entropy"])
        return (torch.ops.unlearn_fast.token_logprobs_backward(x["grad"], None, None, None, *kept, -100, 0.0, 1.0),)

    def formula(function: Any) -> Run:
        return lambda x: (function(x["logits"], x["labels"], x["grad"], x["row_max"] + x["log_sum"]),)

    def exact(x: Inputs) -> Results:
        logits = x["logits"].detach().requires_grad_()
        return torch.autograd.grad(reference.token_logprobs(logits, x["labels"]), logits, x["grad"])

    return Case(
        operator="token_logprobs",
        shape=f"[{N}, {V}]",
        dtype=dtype,
        variant="backward",
        inputs=inputs,
        ours=ours,
        exact=by_rows(in_float64(exact), "logits", "labels", "grad"),
        rivals={"torch.compile": formula(compiled(rivals.gradient_of_logprobs))},
        cost=Cost("the logits read once, as much written", bytes=2 * N * V * dtype.itemsize),
    )


def _with_libraries(case: Case) -> Case:
    smoothed = forward_backward(rivals.liger_cross_entropy, "logits", "labels", label_smoothing=0.1)
    return dataclasses.replace(case, libraries={"Liger": smoothed})


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
        "labels": integers(generator, V, N),
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
    labels = integers(generator, V, B, T)
    labels[:, : T // 4] = -100
    return normal(generator, B, T, V, requires_grad=True), labels
