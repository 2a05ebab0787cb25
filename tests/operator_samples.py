"""Inputs of every operator in `torch.ops.unlearn_fast`, for `torch.library.opcheck`."""

from collections.abc import Sequence

import torch
from layouts import lay_out
from torch import Tensor

IGNORE = -100
HALF = "every second element"
PLAIN = (0.0, 1.0, False)  # softcap, temperature, statistics


def samples() -> dict[str, list[tuple]]:
    """Operator -> argument tuples: plain and strided, with and without gradients, empty, in several dtypes."""
    settings = (0.5, 1.0, 0.1)  # exponent, cap, floor
    of_weight = [False, True, False]
    return {
        "token_logprobs": [
            (_floats(3, 5, grad=True), _labels(3, V=5), IGNORE, *PLAIN),
            (_floats(2, 3, 5).bfloat16().requires_grad_(), _labels(2, 3, V=5).int(), IGNORE, 2.0, 0.5, True),
            (_floats(3, 5, grad=True), _labels(3, V=5), IGNORE, 0.0, 1.0, True),
            (_floats(2, 4, 5, layout="without the last position"), _labels(2, 4, V=5), IGNORE, *PLAIN),
            (
                _floats(2, 4, 5, layout="leading axes swapped"),
                _labels(2, 4, V=5, layout="every second element"),
                1,
                *PLAIN,
            ),
            (_floats(4, 5, layout="last axis outermost", grad=True), _labels(4, V=5), IGNORE, *PLAIN),
            (_floats(2, 3, 4, 5).transpose(0, 2), _labels(4, 3, 2, V=5), IGNORE, *PLAIN),
            (_floats(0, 5, grad=True), _labels(0, V=5), IGNORE, 0.0, 1.0, True),
            (_floats(5), _labels(V=5), IGNORE, *PLAIN),
        ],
        "token_logprobs_backward": [_backward(x, y) for x, y in _logits_and_labels()],
        "token_logprobs_backward_": [_backward(x, y) for x, y in _logits_and_labels() if x.stride(-1) == 1],
        "token_kl": [
            (_floats(3, 5, grad=True), _floats(3, 5), _labels(3, V=5), IGNORE, 0.0, 1.0, 0.0),
            (_floats(2, 3, 5).half().requires_grad_(), _floats(2, 3, 5), _labels(2, 3, V=5), IGNORE, 2.0, 0.5, 1.0),
            (
                _floats(4, 5, layout="last axis outermost", grad=True),
                _floats(4, 5).half(),
                _labels(4, V=5),
                1,
                0.0,
                1.0,
                2.0,
            ),
            (_floats(0, 5, grad=True), _floats(0, 5), _labels(0, V=5), IGNORE, 0.0, 1.0, 0.0),
        ],
        "token_kl_backward": [_kl_backward(x, y) for x, y in _logits_and_labels()],
        "token_kl_backward_": [_kl_backward(x, y) for x, y in _logits_and_labels() if x.stride(-1) == 1],
        "linear_token_logprobs": [
            _linear(_floats(3, 4, grad=True), _floats(5, 4, grad=True), _labels(3, V=5), _floats(5, grad=True), 1),
            _linear(_floats(2, 3, 4).half(), _floats(5, 4).half().requires_grad_(), _labels(2, 3, V=5), None, 1 << 20),
            _linear(_floats(2, 3, 4).transpose(0, 1), _floats(4, 5).T, _labels(3, 2, V=5), None, 40),
            _linear(_floats(0, 4, grad=True), _floats(5, 4), _labels(0, V=5), None, 1),
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
            (*_of_dampening(_floats(3, 4), _floats(5)), [1.0, 0.5], [1.0, 0.5], *settings),
            ([_floats(4, 3).T.half()], [_positive(3, 4).bfloat16()], [_positive(3, 4)], [1.0], [1.0], *settings),
            ([_floats(3).double()], [_positive(3)], [_positive(3).double()], [1.0], [1.0], *settings),
            (*_of_dampening(_floats(0)), [1.0], [1.0], *settings),
            ([], [], [], [], [], *settings),
        ],
        "dampen_record": [
            (*_of_dampening(_floats(3, 4), _floats(5)), [1.0, 0.5]),
            ([_floats(4, 3).T.half()], [_positive(3, 4).bfloat16()], [_positive(3, 4)], [1.0]),
            ([], [], [], []),
        ],
        "dampen_undo_": [_undoing(_floats(3, 4), _floats(5).double()), _undoing(_floats(4, 3).T.half()), _undoing()],
        "alpha_for_percentile": [
            ([_positive(3, 4), _positive(5)], [_positive(3, 4), _positive(5)], [0.0, 50.0, 99.5]),
            ([_positive(4, 3).T.half()], [_positive(3, 4).double()], [20.0]),
            ([], [], [20.0]),
        ],
        "selection_curve": [
            ([_positive(3, 4), _positive(5)], [_positive(3, 4), _positive(5)], [0.0, 1.0, 2.0]),
            ([_positive(4, 3).T.half()], [_positive(3, 4).double()], [1.0]),
            ([], [], [1.0]),
        ],
        "top_fraction_mask": [
            ([_positive(3, 4), _positive(5)], 7),
            ([_positive(4, 3).T.half(), _positive(2).double()], 3),
            ([], 0),
        ],
    }


def _floats(*shape: int, layout: str = "contiguous", grad: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return lay_out(x, layout).requires_grad_(grad)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def _positive(*shape: int) -> Tensor:
    return (3 * torch.rand(shape)).exp()


def _of_dampening(*params: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return (list(params), *([_positive(*p.shape) for p in params] for _ in range(2)))


def _undoing(*params: Tensor) -> tuple:
    p, f, r = _of_dampening(*params)
    return (p, *torch.ops.unlearn_fast.dampen_record(p, f, r, [1.0] * len(p)))


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
    """With every cotangent for one dtype, with only that of log p for the others."""
    every = logits.dtype == torch.float32
    logp, row_max, log_sum, entropy, *_ = torch.ops.unlearn_fast.token_logprobs(logits, labels, IGNORE, 2.0, 0.5, every)
    others = [torch.ones_like(logp) if every else None] * 3
    return (torch.ones_like(logp), *others, logits, labels, logp, row_max, log_sum, entropy, IGNORE, 2.0, 0.5)


def _kl_backward(logits: Tensor, labels: Tensor) -> tuple:
    teacher, options = _floats(*logits.shape), (IGNORE, 2.0, 0.5, 1.0)
    kl, *stats = torch.ops.unlearn_fast.token_kl(logits, teacher, labels, *options)
    return (torch.ones_like(kl), logits, teacher, labels, *stats, *options)


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


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk_bytes: int) -> tuple:
    return (hidden, weight, labels, bias, IGNORE, 2.0, 0.5, chunk_bytes)


def _linear_backward(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple:
    arguments = _linear(hidden, weight, labels, bias, 64)
    logp, *stats = torch.ops.unlearn_fast.linear_token_logprobs(*arguments)
    return (torch.ones_like(logp), *arguments[:4], logp, *stats, *arguments[4:], needs)
