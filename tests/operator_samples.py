"""Inputs of every operator in `torch.ops.unlearn_fast`, for `torch.library.opcheck`."""

from collections.abc import Sequence

import torch
from layouts import lay_out
from torch import Tensor

IGNORE = -100


def samples() -> dict[str, list[tuple]]:
    """Operator -> argument tuples: plain and strided, with and without gradients, empty, in several dtypes."""
    settings = (1.0, 1.0, 0.5, 1.0)  # alpha, lam, exponent, cap
    of_weight = [False, True, False]
    return {
        "token_logprobs": [
            (_floats(3, 5, grad=True), _labels(3, V=5), IGNORE),
            (_floats(2, 3, 5).bfloat16().requires_grad_(), _labels(2, 3, V=5).int(), IGNORE),
            (_floats(2, 4, 5, layout="without the last position"), _labels(2, 4, V=5), IGNORE),
            (_floats(2, 4, 5, layout="leading axes swapped"), _labels(2, 4, V=5, layout="every second element"), 1),
            (_floats(4, 5, layout="last axis outermost", grad=True), _labels(4, V=5), IGNORE),
            (_floats(2, 3, 4, 5).transpose(0, 2), _labels(4, 3, 2, V=5), IGNORE),
            (_floats(0, 5, grad=True), _labels(0, V=5), IGNORE),
            (_floats(5), _labels(V=5), IGNORE),
        ],
        "token_logprobs_backward": [_backward(x, y) for x, y in _logits_and_labels()],
        "token_logprobs_backward_": [_backward(x, y) for x, y in _logits_and_labels() if x.stride(-1) == 1],
        "linear_token_logprobs": [
            (_floats(3, 4, grad=True), _floats(5, 4, grad=True), _labels(3, V=5), _floats(5, grad=True), IGNORE, 1),
            (_floats(2, 3, 4).half(), _floats(5, 4).half().requires_grad_(), _labels(2, 3, V=5), None, IGNORE, 1 << 20),
            (_floats(2, 3, 4).transpose(0, 1), _floats(4, 5).T, _labels(3, 2, V=5), None, IGNORE, 40),
            (_floats(0, 4, grad=True), _floats(5, 4), _labels(0, V=5), None, IGNORE, 1),
        ],
        "linear_token_logprobs_backward": [
            _linear_backward(_floats(3, 4), _floats(5, 4), _labels(3, V=5), _floats(5), [True, True, True]),
            _linear_backward(_floats(3, 4), _floats(5, 4), _labels(3, V=5), None, [True, False, False]),
            _linear_backward(_floats(3, 4).bfloat16(), _floats(5, 4).bfloat16(), _labels(3, V=5), None, of_weight),
            _linear_backward(_floats(2, 3, 4).transpose(0, 1), _floats(4, 5).T, _labels(3, 2, V=5), None, of_weight),
        ],
        "sum_grad_squared_linear_": [
            (_floats(3, 4), _floats(2, 5, 4), _floats(2, 5, 3), None, None, 0.5, False),
            (_floats(3, 4), _floats(6, 4).bfloat16(), _floats(6, 3).bfloat16(), _floats(6), _zeros(3, 4), 1.0, False),
            (_floats(4, 3).T, _floats(5, 2, 4).transpose(0, 1), _floats(2, 5, 3), _floats(2), _zeros(3, 4), 1.0, True),
            (_floats(3, 4), _floats(0, 5, 4), _floats(0, 5, 3), _floats(0), None, 1.0, False),
        ],
        "sum_grad_squared_embedding_": [
            (_floats(5, 3), _labels(2, 4, V=5), _floats(2, 4, 3), None, None, 0.5, False),
            (_floats(5, 3), _labels(2, 4, V=5).int(), _floats(2, 4, 3).half(), _positive(2), _floats(5, 3), 1.0, True),
            (
                _floats(3, 5).T,
                _labels(4, 2, V=5) - 1,
                _floats(2, 4, 3).transpose(0, 1),
                None,
                _floats(3, 5).T,
                1.0,
                False,
            ),
            (_floats(5, 3), _labels(0, 4, V=5), _floats(0, 4, 3), None, _floats(5, 3), 1.0, False),
        ],
        "sum_grad_squared_scale_": [
            (_floats(3), _floats(2, 5, 3), _floats(2, 5, 3), None, None, 0.5, False),
            (_floats(3), None, _floats(2, 5, 3).bfloat16(), _positive(2), _floats(3), 1.0, True),
            (_floats(6)[::2], _floats(2, 3, 5).transpose(1, 2), _floats(2, 5, 3), None, _floats(3), 1.0, False),
            (_floats(3), None, _floats(2, 0, 3), None, _floats(3), 1.0, False),
        ],
        "sum_grad_squared_conv_": [
            _convolution(_floats(3, 2, 3, 3), _floats(2, 1, 2, 6, 5), _floats(2, 1, 3, 4, 3)),
            _convolution(_floats(4, 1, 3), _floats(2, 2, 2, 9), _floats(2, 2, 4, 5), [2], [1], [1], 2, moments=True),
            _convolution(
                _floats(3, 2, 1, 2, 2),
                _floats(2, 1, 2, 3, 4, 4).bfloat16(),
                _floats(2, 1, 3, 3, 2, 2).bfloat16(),
                [1, 1, 1],
                [0, 0, 0],
                [1, 2, 2],
            ),
            _convolution(_floats(3, 2, 3, 3), _floats(0, 1, 2, 6, 5), _floats(0, 1, 3, 4, 3)),
        ],
        "dampen_": [
            ([_floats(3, 4), _floats(5)], *[[_positive(3, 4), _positive(5)] for _ in range(2)], *settings),
            ([_floats(4, 3).T.half()], [_positive(3, 4)], [_positive(3, 4)], *settings),
            ([_floats(3).double()], [_positive(3)], [_positive(3).double()], *settings),
            ([_floats(0)], [_positive(0)], [_positive(0)], *settings),
            ([], [], [], *settings),
        ],
    }


def _floats(*shape: int, layout: str = "contiguous", grad: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return lay_out(x, layout).requires_grad_(grad)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def _positive(*shape: int) -> Tensor:
    return (3 * torch.rand(shape)).exp()


def _labels(*shape: int, V: int, layout: str = "contiguous") -> Tensor:
    labels = torch.randint(V, shape, generator=torch.Generator().manual_seed(0))
    if labels.numel() > 1:
        labels.view(-1)[1] = 1
    return lay_out(labels, layout)


def _logits_and_labels() -> list[tuple[Tensor, Tensor]]:
    return [
        (_floats(3, 5), _labels(3, V=5)),
        (_floats(2, 3, 5).bfloat16(), _labels(2, 3, V=5)),
        (_floats(2, 4, 5, layout="without the last position"), _labels(2, 4, V=5)),
        (_floats(2, 4, 5).transpose(0, 1), _labels(4, 2, V=5)),
        (_floats(4, 5, layout="last axis outermost"), _labels(4, V=5)),
        (_floats(0, 5), _labels(0, V=5)),
    ]


def _backward(logits: Tensor, labels: Tensor) -> tuple:
    logp, *stats = torch.ops.unlearn_fast.token_logprobs(logits, labels, IGNORE)
    return (torch.ones_like(logp), logits, labels, logp, *stats, IGNORE)


def _convolution(
    out: Tensor,
    inputs: Tensor,
    grads: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    moments: bool = False,
) -> tuple:
    weights, first = (_floats(len(inputs)), torch.zeros_like(out)) if moments else (None, None)
    settings = (list(x) for x in (stride, padding, dilation))
    return (out, inputs, grads, *settings, groups, weights, first, 0.5, moments)


def _linear_backward(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple:
    logp, *stats = torch.ops.unlearn_fast.linear_token_logprobs(hidden, weight, labels, bias, IGNORE, 64)
    return (torch.ones_like(logp), hidden, weight, labels, bias, logp, *stats, IGNORE, 64, needs)
