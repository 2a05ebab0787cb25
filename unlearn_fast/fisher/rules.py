"""One visible table: module type -> rule.

A rule turns what a module saw in one forward and backward into the per-example gradients of its parameters. It gets the
module, its input, the loss gradient of its output, and n, the number of examples. The leading axis of both tensors
holds n examples, each as equally many consecutive entries (n itself, or n * windows, n * T when flattened).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.fisher.gradients import WORKSPACE_BYTES, Dense, Outer, PerExampleGradient, Rows, wide

Rule = Callable[[Any, Tensor, Tensor, int], dict[str, PerExampleGradient]]


def linear(module: nn.Linear, x: Tensor, grad: Tensor, n: int) -> dict[str, PerExampleGradient]:
    x, grad = x.reshape(n, -1, x.shape[-1]), grad.reshape(n, -1, grad.shape[-1])
    bias = {"bias": Dense(grad.sum(1, dtype=wide(grad)))} if module.bias is not None else {}
    return {"weight": Outer(x, grad), **bias}


def conv2d(module: nn.Conv2d, x: Tensor, grad: Tensor, n: int) -> dict[str, PerExampleGradient]:
    if x.dim() != 4:
        raise NotImplementedError("an unbatched convolution")
    weight = {"weight": Convolution(module, x, grad, n)}
    if module.bias is None:
        return {**weight}
    bias = grad.flatten(2).sum(2, dtype=wide(grad)).reshape(n, -1, grad.shape[1]).sum(1)
    return {**weight, "bias": Dense(bias)}


def embedding(module: nn.Embedding, tokens: Tensor, grad: Tensor, n: int) -> dict[str, PerExampleGradient]:
    if module.scale_grad_by_freq or module.sparse or module.max_norm is not None:
        raise NotImplementedError("an embedding with scale_grad_by_freq, sparse gradients or max_norm")
    tokens, grad = tokens.reshape(n, -1).long(), grad.reshape(n, -1, grad.shape[-1])
    if module.padding_idx is not None:
        grad = grad.masked_fill((tokens == module.padding_idx).unsqueeze(-1), 0)
    return {"weight": Rows(tokens, grad, module.num_embeddings)}


def layer_norm(module: nn.LayerNorm, x: Tensor, grad: Tensor, n: int) -> dict[str, PerExampleGradient]:
    shape = module.normalized_shape
    normalized = nn.functional.layer_norm(x.to(wide(x)), shape, eps=module.eps)
    weight, bias = (t.reshape(n, -1, *shape).sum(1, dtype=wide(grad)) for t in (grad * normalized, grad))
    return {"weight": Dense(weight), "bias": Dense(bias)}


def batch_norm(module: Any, x: Tensor, grad: Tensor, n: int) -> dict[str, PerExampleGradient]:
    channels = [1, -1] + [1] * (x.dim() - 2)
    mean, std = module.running_mean.view(channels), (module.running_var + module.eps).sqrt().view(channels)
    both = ((x - mean) / std * grad, grad)
    weight, bias = (t.flatten(2).sum(2) if t.dim() > 2 else t for t in both)
    return {name: Dense(t.reshape(n, -1, t.shape[1]).sum(1)) for name, t in (("weight", weight), ("bias", bias))}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the module's type, or of the nearest base type whose forward it has not overridden."""
    for base in type(module).__mro__:
        if base in RULES:
            return RULES[base] if type(module).forward is base.forward else None
    return None


@dataclass
class Convolution:
    """The weight of a convolution: the linear layer's gradient on the input, unfolded some examples at a time."""

    module: nn.Conv2d
    x: Tensor  # [D, C, height, width], D a multiple of n
    grads: Tensor  # [D, O, height', width']
    n: int

    def add_squares_(self, out: Tensor) -> None:
        unfolded = (
            self.x[0].numel() * self.module.weight[0, 0].numel() * self.x.element_size() * (len(self.x) // self.n)
        )
        step = max(1, WORKSPACE_BYTES // max(1, unfolded))
        groups = self.module.groups
        for start in range(0, self.n, step):
            stop = min(self.n, start + step)
            for group, per_group in zip(self._unfolded(start, stop), out.chunk(groups), strict=True):
                group.add_squares_(per_group)

    def example(self, b: int) -> Tensor:
        return torch.cat([group.example(0) for group in self._unfolded(b, b + 1)])

    def examples(self) -> int:
        return self.n

    def _unfolded(self, start: int, stop: int) -> list[Outer]:
        """One linear layer a group: inputs [B, positions, C/groups * kernel], grads [B, positions, O/groups]."""
        module, per = self.module, len(self.x) // self.n
        x, grads = self.x[start * per : stop * per], self.grads[start * per : stop * per].flatten(2)
        padding: Any = module.padding
        if module.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
            padding = 0
        columns = nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
        B = stop - start
        return [
            Outer(_positions(c, B), _positions(g, B))
            for c, g in zip(columns.chunk(module.groups, 1), grads.chunk(module.groups, 1), strict=True)
        ]


def _positions(t: Tensor, B: int) -> Tensor:
    """[D, C, L] -> [B, D/B * L, C]; a view where D = B."""
    t = t.transpose(1, 2)
    return t if len(t) == B else t.reshape(B, -1, t.shape[-1])
