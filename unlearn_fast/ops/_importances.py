"""Checks of the importances to both sets, and of scores, where no parameters are at hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from unlearn_fast.ops import _checks

Tensors = Mapping[str, Tensor] | Sequence[Tensor]


def named(argument: str, given: Any) -> dict[str, Tensor]:
    """By name, or by position for a list."""
    if isinstance(given, Mapping):
        tensors = {str(name): value for name, value in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        tensors = {str(i): value for i, value in enumerate(given)}
    else:
        raise TypeError(f"{argument} is a {type(given).__name__}: it must be a mapping name -> tensor, or a list")
    for name, value in tensors.items():
        _checks.dense(f"{argument}[{name!r}]", value)
    return {name: value.detach() for name, value in tensors.items()}


def both(forget: Any, reference: Any) -> tuple[tuple[str, ...], list[Tensor], list[Tensor]]:
    """The names, and the two importances of each, on the device of the first; a `module.` prefix does not matter, but
    where both have a name as it stands."""
    if isinstance(forget, Mapping) != isinstance(reference, Mapping):
        raise TypeError("forget and reference are a mapping and a list: both must be of one kind")
    f, r = named("forget", forget), named("reference", reference)
    if not isinstance(forget, Mapping) and len(f) != len(r):
        raise ValueError(f"reference has {len(r)} tensors: it must have {len(f)}, as forget has")
    bare = {name.removeprefix("module."): name for name in r if name not in f}
    partners = {name: name if name in r else bare.pop(name.removeprefix("module."), None) for name in f}
    for name, partner in partners.items():
        if partner is None:
            raise ValueError(f"reference has no {name!r}, and forget has: both must have the same names")
    taken = set(partners.values())
    if (stranger := next((name for name in r if name not in taken), None)) is not None:
        raise ValueError(f"reference has {stranger!r}, and forget has not: both must have the same names")
    of_reference = [r[str(partner)] for partner in partners.values()]
    for (name, a), b in zip(f.items(), of_reference, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"reference[{name!r}] has shape {_checks.shape(b)}: it must have that of forget, {_checks.shape(a)}"
            )
    return tuple(f), list(f.values()), [b.to(a.device) for a, b in zip(f.values(), of_reference, strict=True)]
