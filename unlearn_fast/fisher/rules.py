"""One visible table: torch function, or module type -> rule.

A rule has the signature of its function and returns, for each argument that may be a parameter, how the per-example
gradients of that argument follow from the loss gradient of the function's output: what must be kept until then, and the
form they take. By the time the form is asked for, everything kept and the gradient have the examples in front: what was
[B, ...], [B * T, ...] or [T, B, ...] in the model arrives as [n, ...].

Functions without a rule need none where parameters enter by broadcasting (`x * gain`, `x + bias`), where they are made
of other parameters (`weight.t()`, `1 + weight`, a parametrization), or are expanded over the batch: see `tracing.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlearn_fast.fisher.gradients import Convolution, Outer, PerExampleGradient, Rows, Scaled, wide


class Use(NamedTuple):
    """How the per-example gradients of one argument follow."""

    keep: tuple[Tensor, ...]  # what the form needs beside the gradient
    form: Callable[..., PerExampleGradient]  # (gradient of the output, *keep), examples in front


Rule = Callable[..., Mapping[str, Use] | None]
"""None: these arguments have no rule."""

RULES: dict[Any, Rule] = {}


def rule_for(*functions: Any) -> Callable[[Rule], Rule]:
    """Enters the decorated rule for torch functions, or for module types."""

    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return enter


def _rows(t: Tensor, width: int) -> Tensor:
    """[n, ..., width] -> [n, T, width]."""
    return t if t.dim() == 3 and t.shape[2] == width else t.reshape(t.shape[0], -1, width)


def _channels(t: Tensor, spatial: int) -> Tensor:
    """[n, C, *spatial] or [n, W, C, *spatial] -> [n, T, C], a view where there are no windows W."""
    t = t.movedim(-spatial - 1, -1)
    return t.flatten(1, -2) if t.dim() > 2 else t.unsqueeze(1)


def _bias(width: int) -> Use:
    return Use((), lambda grad: Scaled(None, _rows(grad, width), (width,)))


@rule_for(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Mapping[str, Use] | None:
    if weight.dim() != 2:
        return None
    O, I = weight.shape  # noqa: E741
    of_weight = Use((input,), lambda grad, x: Outer(_rows(x, I), _rows(grad, O)))
    return {"weight": of_weight, "bias": _bias(O)}


@rule_for(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__)
def matmul(input: Tensor, other: Tensor) -> Mapping[str, Use]:
    """`x @ weight`, and `weight @ x`."""
    uses = {}
    if other.dim() == 2 and input.dim() > 1:
        I, O = other.shape  # noqa: E741
        uses["other"] = Use((input,), lambda grad, x: Outer(_rows(grad, O), _rows(x, I)))
    if input.dim() == 2 and other.dim() > 2:
        uses["input"] = Use((other,), lambda grad, x: Outer(_columns(x), _columns(grad)))
    return uses


def _columns(t: Tensor) -> Tensor:
    """[n, ..., features, T] -> [n, T, features]."""
    return t.transpose(-1, -2).reshape(len(t), -1, t.shape[-2])


@rule_for(torch.addmm, Tensor.addmm)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Mapping[str, Use]:
    """`bias + x @ weight`, as in the Conv1D of GPT-2."""
    I, O = mat2.shape  # noqa: E741
    of_weight = Use((mat1,), lambda grad, x: Outer(_rows(grad * alpha if alpha != 1 else grad, O), _rows(x, I)))
    uses = {"mat2": of_weight}
    if input.shape == (O,):
        uses["input"] = Use((), lambda grad: Scaled(None, _rows(grad * beta if beta != 1 else grad, O), (O,)))
    return uses


@rule_for(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Mapping[str, Use] | None:
    if max_norm is not None or scale_grad_by_freq:
        return None
    return {"weight": Use((input,), lambda grad, tokens: embedding_rows(tokens, grad, weight, padding_idx))}


def embedding_rows(tokens: Tensor, grad: Tensor, weight: Tensor, padding_idx: int | None) -> Rows:
    V, H = weight.shape
    tokens = tokens.reshape(len(tokens), -1)
    if padding_idx is not None:
        tokens = tokens.masked_fill(tokens == padding_idx % V, -1)
    return Rows(tokens, _rows(grad, H), V)


@rule_for(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Mapping[str, Use] | None:
    spatial = weight.dim() - 2
    if input.dim() != weight.dim():  # without a batch axis
        return None
    stride, dilation = _each(stride, spatial), _each(dilation, spatial)
    if isinstance(padding, str):
        reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(r % 2 for r in reach):  # one more on the right: pad that much here
            input = F.pad(input, [r % 2 * side for r in reversed(reach) for side in (0, 1)])
        padding = [r // 2 for r in reach]
    geometry = {"stride": stride, "padding": _each(padding, spatial), "dilation": dilation, "groups": groups}
    return {
        "weight": Use((input,), lambda grad, x: Convolution(x, grad, weight.shape, **geometry)),
        "bias": Use((), lambda grad: Scaled(None, _channels(grad, spatial), weight.shape[:1])),
    }


@rule_for(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Mapping[str, Use] | None:
    """A convolution with the parts of its input and of its output's gradient exchanged."""
    spatial = weight.dim() - 2
    if input.dim() != weight.dim():
        return None
    # With output_padding >= stride the output has room for further inputs: as many zeros take their place.
    missing = [
        extra // step for extra, step in zip(_each(output_padding, spatial), _each(stride, spatial), strict=True)
    ]
    geometry = {
        "stride": _each(stride, spatial),
        "padding": _each(padding, spatial),
        "dilation": _each(dilation, spatial),
        "groups": groups,
    }

    def of_weight(grad: Tensor, x: Tensor) -> Convolution:
        if any(missing):
            x = F.pad(x, [count * side for count in reversed(missing) for side in (0, 1)])
        return Convolution(grad, x, weight.shape, **geometry)

    channels = weight.shape[1] * groups
    of_bias = Use((), lambda grad: Scaled(None, _channels(grad, spatial), (channels,)))
    return {"weight": Use((input,), of_weight), "bias": of_bias}


def _each(value: Any, axes: int) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * axes if len(values) == 1 else values


@rule_for(F.layer_norm)
def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Mapping[str, Use]:
    return _trailing_norm(input, normalized_shape, lambda x: F.layer_norm(x, normalized_shape, eps=eps))


@rule_for(F.rms_norm)
def rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Mapping[str, Use]:
    return _trailing_norm(input, normalized_shape, lambda x: F.rms_norm(x, normalized_shape, eps=eps))


def _trailing_norm(input: Tensor, shape: Any, normalize: Callable[[Tensor], Tensor]) -> Mapping[str, Use]:
    shape = tuple(shape)
    width = torch.Size(shape).numel()

    def of_weight(grad: Tensor, x: Tensor) -> Scaled:
        return Scaled(x, _rows(grad, width), shape, lambda part: _rows(normalize(part.to(wide(part))), width))

    return {
        "weight": Use((input,), of_weight),
        "bias": Use((), lambda grad: Scaled(None, _rows(grad, width), shape)),
    }


@rule_for(F.group_norm)
def group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Mapping[str, Use]:
    rank = input.dim()  # no form may hold the input itself: it would live until the end of the backward

    def normalize(x: Tensor) -> Tensor:
        return F.group_norm(x.flatten(0, x.dim() - rank), num_groups, eps=eps).view_as(x)

    return _channel_norm(input, normalize)


@rule_for(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Mapping[str, Use] | None:
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, eps=eps)

    rank = input.dim()

    def normalize(x: Tensor) -> Tensor:
        return F.instance_norm(x.flatten(0, x.dim() - rank), eps=eps).view_as(x)

    return _channel_norm(input, normalize)


@rule_for(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Mapping[str, Use]:
    if training or running_mean is None:
        raise ValueError(
            "batch_norm uses the statistics of the batch, which couples its examples: it must use running statistics"
        )
    channels = [-1] + [1] * (input.dim() - 2)

    def normalize(x: Tensor) -> Tensor:
        mean, var = (t.to(x.dtype).view(channels) for t in (running_mean, running_var))
        return (x - mean) * (var + eps).rsqrt()

    return _channel_norm(input, normalize)


def _channel_norm(input: Tensor, normalize: Callable[[Tensor], Tensor]) -> Mapping[str, Use]:
    spatial, shape = input.dim() - 2, input.shape[1:2]

    def of_weight(grad: Tensor, x: Tensor) -> Scaled:
        return Scaled(x, _channels(grad, spatial), shape, lambda p: _channels(normalize(p.to(wide(p))), spatial))

    return {
        "weight": Use((input,), of_weight),
        "bias": Use((), lambda grad: Scaled(None, _channels(grad, spatial), shape)),
    }


@rule_for(F.prelu, torch.prelu, Tensor.prelu)
def prelu(input: Tensor, weight: Tensor) -> Mapping[str, Use] | None:
    spatial = input.dim() - 2
    if input.dim() < 2:
        return None

    def of_weight(grad: Tensor, x: Tensor) -> Scaled:
        negative = x.clamp(max=0)
        if weight.numel() == 1:
            return Scaled(_rows(negative, 1), _rows(grad, 1), weight.shape)
        return Scaled(_channels(negative, spatial), _channels(grad, spatial), weight.shape)

    return {"weight": Use((input,), of_weight)}


def module_rule(module: nn.Module) -> Rule | None:
    """The rule of the module's type, or of the nearest base type whose forward it has not overridden."""
    kind: Any = type(module)
    for base in kind.__mro__:
        if base in RULES:
            return RULES[base] if kind.forward is base.forward else None
    return None
