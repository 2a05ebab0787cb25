"""Settings of a dampening: numbers, or one for each parameter, chosen by name."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from unlearn_fast.ops import _checks

Setting = float | Mapping[str, float] | Callable[[str], float | None]

RANGE = re.compile(r"(.*)\[(\d*):(\d*)\](.*)", re.DOTALL)  # model.layers[8:16].mlp


def check_settings(alpha: Setting, lam: Setting, exponent: float, cap: float, floor: float = 0.0) -> None:
    """Raises where a setting is negative, zero for the exponent, not a number, or floor above cap."""
    for name, setting in (("alpha", alpha), ("lam", lam)):
        if isinstance(setting, Mapping):
            if strangers := [key for key in setting if not isinstance(key, str)]:
                raise TypeError(
                    f"{name} has the key {strangers[0]!r}: it must be a string, a name or the start of names"
                )
            for key, value in setting.items():
                _check(f"{name}[{key!r}]", value)
        elif not callable(setting):
            _check(name, setting)
    for name, value in (("exponent", exponent), ("cap", cap), ("floor", floor)):
        _check(name, value)
    if floor > cap:
        raise ValueError(f"floor is {floor} and cap {cap}: floor must not be above cap")


def _check(name: str, value: Any) -> None:
    number = _checks.number(name, value, above=name == "exponent")
    if name.partition("[")[0] in ("lam", "floor") and number > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} is {value}: it must be finite in float32, because inf * 0 is no factor")


def by_parameter(name: str, setting: Setting, params: Sequence[str]) -> list[float | None]:
    """The setting called `name` for each of the parameters; None where it leaves one out."""
    if isinstance(setting, Mapping):
        return _by_key(name, setting, params)
    if not callable(setting):
        return [float(setting)] * len(params)
    values = [setting(param) for param in params]
    for param, value in zip(params, values, strict=True):
        if value is not None:
            _check(f"{name}[{param!r}]", value)
    return [None if value is None else float(value) for value in values]


def _by_key(name: str, setting: Mapping[str, float], params: Sequence[str]) -> list[float | None]:
    """Of the keys that fit a parameter, the one that fits most of its name counts."""
    reach = {key: [_reach(key, param) for param in params] for key in setting}
    for key, reaches in reach.items():
        if not any(r is not None for r in reaches):
            raise ValueError(
                f"{name} has {key!r}, which fits no parameter that has importances: it must be a name,"
                " or the start of names"
            )
    values: list[float | None] = []
    for i, param in enumerate(params):
        fitting = [(r[i], key) for key, r in reach.items() if r[i] is not None]
        best = [key for depth, key in fitting if depth == max(d for d, _ in fitting)]  # type: ignore[type-var]
        if len(best) > 1:
            raise ValueError(f"{name} has {best[0]!r} and {best[1]!r}, which both fit {param!r}: only one may")
        values.append(float(setting[best[0]]) if best else None)
    return values


def _reach(key: str, param: str) -> int | None:
    """How many parts of the name the key fits, from its start on; None where it does not."""
    parts = param.split(".")
    if key == "":
        return 0
    if (found := RANGE.fullmatch(key)) is None:
        wanted: list[str | range] = [*key.split(".")]
    else:
        before, first, last, after = found.groups()
        numbered = range(int(first or 0), int(last) if last else 1 << 62)
        start, end = ([*part.strip(".").split(".")] if part else [] for part in (before, after))
        wanted = [*start, numbered, *end]
    fits = len(wanted) <= len(parts) and all(
        part == want if isinstance(want, str) else part.isdecimal() and int(part) in want
        for part, want in zip(parts, wanted, strict=False)
    )
    return len(wanted) if fits else None
