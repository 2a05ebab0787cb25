"""A call of every operator, larger than the samples of `operator_samples`, and how to run it anywhere."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import unlearn_fast  # noqa: F401

SYNCHRONIZING = {  # they return as many elements as they find, or numbers to the CPU
    "dampen_record", "alpha_for_percentile", "selection_curve", "top_fraction_mask",
}  # fmt: skip


def calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Operator -> arguments, on the CPU, with what is read in this dtype."""
    return of_sums(dtype) | _of_rows(dtype) | _of_dampening(dtype)


def of_sums(dtype: torch.dtype) -> dict[str, tuple]:
    """Out, what it reads, weights, first, and settings."""
    wide = torch.promote_types(dtype, torch.float32)
    weights, tail = randn(6, dtype=wide), (0.5, False)

    def arguments(shape: tuple[int, ...], *read: object) -> tuple:
        return torch.zeros(shape, dtype=wide), *read, weights, torch.zeros(shape, dtype=wide), *tail

    a, g = randn(6, 70, 130, dtype=dtype), randn(6, 70, 65, dtype=dtype)
    x, y = randn(6, 1, 24, 9, 8, dtype=dtype), randn(6, 1, 40, 9, 8, dtype=dtype)
    tokens = torch.randint(-1, 50, (6, 70), generator=torch.Generator().manual_seed(0))
    return {
        "sum_grad_squared_linear_": arguments((65, 130), a, g),
        "sum_grad_squared_conv_": arguments((40, 24, 3, 3), x, y, [1, 1], [1, 1], [1, 1], 1),
        "sum_grad_squared_embedding_": arguments((50, 65), tokens, g),
        "sum_grad_squared_scale_": arguments((65,), g, g),
    }


def _of_rows(dtype: torch.dtype) -> dict[str, tuple]:
    N, V, H = 37, 5003, 96
    ops, ends = torch.ops.unlearn_fast, (-100, 20.0, 0.7)
    logits, teacher = (3 * randn(N, V + k, dtype=dtype)[:, :V] for k in (0, 1))
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    labels[1] = -100
    hidden, weight, bias = randn(N, H, dtype=dtype), randn(V, H, dtype=dtype) / H**0.5, randn(V, dtype=dtype)
    lm_head = (hidden, weight, labels, bias)
    found = ops.token_logprobs(logits, labels, *ends, True)
    divergence = ops.token_kl(logits, teacher, labels, *ends, 2.0)
    linear = ops.linear_token_logprobs(*lm_head, *ends, 1 << 20)
    grad = torch.linspace(-1, 2, N, dtype=found[0].dtype)
    backward = (*[grad] * 4, logits, labels, *found[:4], *ends)
    backward_kl = (grad, logits, teacher, labels, *divergence[1:], *ends, 2.0)
    return {
        "token_logprobs": (logits, labels, *ends, True),
        "token_logprobs_backward": backward,
        "token_logprobs_backward_": backward,
        "token_kl": (logits, teacher, labels, *ends, 2.0),
        "token_kl_backward": backward_kl,
        "token_kl_backward_": backward_kl,
        "linear_token_logprobs": (*lm_head, *ends, 1 << 20),
        "linear_token_logprobs_backward": (grad, *lm_head, *linear, *ends, 1 << 20, [True, True, True]),
    }


def _of_dampening(dtype: torch.dtype) -> dict[str, tuple]:
    p = [randn(n, dtype=dtype) for n in (70_001, 5, 4096)]
    r = [(randn(len(t)).square() + 0.1).to(dtype) for t in p]
    f = [(t.double() * 3 * randn(len(t) + 1)[1:].abs()).to(dtype) for t in r]
    numbers = [1.0, 1.5, 2.0]
    record = torch.ops.unlearn_fast.dampen_record(p, f, r, numbers)
    return {
        "dampen_": (p, f, r, numbers, [0.7, 1.0, 1.1], 1.0, 0.9, 0.05),
        "dampen_record": (p, f, r, numbers),
        "dampen_undo_": (p, *record),
        "alpha_for_percentile": (f, r, [0.0, 50.0, 99.5]),
        "selection_curve": (f, r, [0.0, 0.5, 2.0]),
        "top_fraction_mask": ([t.double().float() for t in f], 5000),
    }


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def placed(arguments: Any, device: str | torch.device, offset: int = 0) -> Any:
    """Copies of all tensors on a device, with their strides, `offset` elements into memory of their own."""

    def place(x: Tensor) -> Tensor:
        memory = x.detach().new_empty(0).set_(x.untyped_storage())
        whole = torch.zeros(len(memory) + offset, dtype=x.dtype, device=device)
        whole[offset:] = memory.to(device)
        view = whole.as_strided(x.shape, x.stride(), x.storage_offset() + offset)
        return view.requires_grad_(x.requires_grad)

    return mapped(place, arguments)


def mapped(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """The arguments with the function's result in place of every tensor; the same one for the same tensor."""
    seen: dict[int, Tensor] = {}

    def walk(x: Any) -> Any:
        if isinstance(x, Tensor):
            if id(x) not in seen:
                seen[id(x)] = function(x)
            return seen[id(x)]
        return type(x)(map(walk, x)) if isinstance(x, (list, tuple)) else x

    return walk(arguments)


def tensors(x: Any) -> list[Tensor]:
    """All of them, in order."""
    found: list[Tensor] = []
    mapped(lambda t: found.append(t) or t, x)  # type: ignore[func-returns-value]
    return found


def run(name: str, arguments: tuple) -> list[Tensor]:
    """What the operator returns, and then its arguments as it left them."""
    returned = getattr(torch.ops.unlearn_fast, name)(*arguments)
    return [t.detach() for t in (*tensors(returned), *tensors(arguments))]
