"""Tensors with awkward strides, lying in memory that must be neither read nor written."""

import torch
from accuracy import bits
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROW_LAYOUTS = ("contiguous", "leading axes swapped", "inside a larger tensor", "without the last position")
LAYOUTS = (*ROW_LAYOUTS, "last axis outermost", "every second element")

POISON = {True: float("nan"), False: -7}  # floating: NaN shows wherever it is read; integers: no label is negative


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A copy of x in another layout. ROW_LAYOUTS keep stride 1 on the last axis."""
    poison = POISON[x.is_floating_point()]
    match layout:
        case "leading axes swapped" if x.dim() > 2:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "inside a larger tensor" if x.dim() > 0:
            place = x.new_full([n + 3 for n in x.shape], poison)[tuple(slice(1, n + 1) for n in x.shape)]
        case "without the last position" if x.dim() > 1:
            place = x.new_full([*x.shape[:-2], x.shape[-2] + 1, x.shape[-1]], poison)[..., :-1, :]
        case "last axis outermost" if x.dim() > 1:
            return x.movedim(-1, 0).contiguous().movedim(0, -1)
        case "every second element" if x.dim() > 0:
            place = x.new_full([2 * n for n in x.shape], poison)[(slice(None, None, 2),) * x.dim()]
        case _:
            return x.clone(memory_format=torch.contiguous_format)
    return place.copy_(x)


def surroundings(view: Tensor) -> Tensor:
    """The bits of everything in the tensor's storage that is not an element of it."""
    memory = view.detach().new_empty(0).set_(view.untyped_storage())
    own = torch.zeros(len(memory), dtype=torch.bool)
    own.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return bits(memory[~own])
