"""What the operators over rows of logits share: their common options, the shift by one, and overwriting logits."""

import math
from typing import Any

import torch
from torch import Tensor

from unlearn_fast.ops import _checks


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that rows are computed and returned in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_scaling(softcap: float | None, temperature: float) -> float:
    """The operators' softcap, in which 0 means none."""
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap is {softcap}: it must be finite and above 0, or None")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be finite and above 0")
    return 0.0 if softcap is None else float(softcap)


def next_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """labels[..., t + 1] at position t. Moving the labels is free; slicing the logits costs a copy backward."""
    if labels.dim() == 0:
        raise ValueError("labels has shape []: it must be [..., T], as shift=True moves it along T")
    targets = labels.roll(-1, dims=-1)
    targets[..., -1:] = ignore_index
    return targets


def scaled(logits: Tensor, softcap: float, temperature: float) -> Tensor:
    """z = cap(logits) / temperature."""
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    return capped / temperature


def slope(logits: Tensor, softcap: float, temperature: float) -> Tensor | float:
    """dz / dlogits."""
    return (1 - torch.tanh(logits / softcap).square()) / temperature if softcap else 1 / temperature


def may_overwrite(logits: Tensor) -> bool:
    """Whether inplace_backward means anything here; torch.compile decides on memory itself."""
    return not torch.compiler.is_compiling() and logits.requires_grad and torch.is_grad_enabled()


def refuse_needed_logits(logits: Tensor) -> None:
    """Raises where overwriting the logits in the backward could change what autograd, or the caller, still reads."""
    if _checks.may_overlap(logits.shape, logits.stride()) or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise ValueError(
            "inplace_backward needs logits with stride 1 on the last axis and no overlapping (expanded) memory"
        )
    for tensor, what in ((logits, "logits"), (logits._base, "the tensor that logits is a view of")):
        if tensor is None:
            continue
        if tensor.is_leaf:
            raise ValueError(
                f"inplace_backward would overwrite {what}, a leaf that requires grad: leave it off, or clone"
            )
        if _saves_its_result(tensor):
            name = tensor.grad_fn.name() if tensor.grad_fn is not None else "?"
            raise ValueError(
                f"inplace_backward would overwrite {what}, which {name} still needs for its own backward:"
                " leave it off, or clone the logits"
            )


def _saves_its_result(tensor: Tensor) -> bool:
    """Whether the node that made the tensor saved memory of it, as tanh or exp do (a softcap, say)."""
    node: Any = tensor.grad_fn
    saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    saved += list(getattr(node, "saved_tensors", ()) or ())
    storage = tensor.untyped_storage().data_ptr()
    return any(isinstance(s, Tensor) and s.untyped_storage().data_ptr() == storage for s in saved)


def overwrite_once(ctx: Any) -> None:
    """Raises in a second backward, or one that is to be differentiated, of an operator that overwrites its logits."""
    if torch.is_grad_enabled():
        raise NotImplementedError("inplace_backward cannot be differentiated twice: leave it off")
    if ctx.overwritten:
        raise RuntimeError(
            "the logits were overwritten by an earlier backward through this graph:"
            " leave inplace_backward off where the graph is kept (retain_graph=True)"
        )
    ctx.overwritten = True
