"""The two forms of every loss, from logits and from hidden states: one function of the rows' numbers serves both.

A loss is the mean over the B sequences of a function of the log-probabilities of a sequence's labelled tokens; some
losses take two sequences each, two sides. Labels are aligned with the input tokens, and shifted by one inside: position
t is scored on label t + 1. A sequence without a labelled token adds 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_fast._library import warn_if_slow
from unlearn_fast.losses.linear import Head, MeanOfSequences, Unit, mean_of_sequences
from unlearn_fast.losses.rows import LabelRows, Rows, TeacherRows
from unlearn_fast.losses.vocabulary import ShardedRows, VocabularyShard
from unlearn_fast.ops import _checks
from unlearn_fast.ops._rows import check_scaling, next_labels
from unlearn_fast.ops.token_kl import token_kl
from unlearn_fast.ops.token_logprobs import token_logprobs

Values = Callable[..., Tensor]  # (row numbers [b, T], labelled [b, T], those of the other side, *constants [b]) -> [b]
Sides = Mapping[str, tuple[Tensor, Tensor]]  # prefix of the arguments' names -> logits or hidden states, labels
Constants = Mapping[str, Tensor]  # name of the argument -> [B]


class LogitsOptions(NamedTuple):
    """Options of every loss from logits."""

    ignore_index: int = -100  # label of the tokens that do not count
    softcap: float | None = None  # the logits x are softcap * tanh(x / softcap)
    temperature: float = 1.0  # the logits are divided by it, after the softcap
    inplace_backward: bool = False  # the backward writes the gradient over the logits: see `token_logprobs`

    def logprobs(self, logits: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(logits, targets, **self._asdict())


class LinearOptions(NamedTuple):
    """Options of every loss from hidden states and the lm_head."""

    bias: Tensor | None = None  # [V], of the lm_head
    ignore_index: int = -100  # label of the tokens that do not count
    softcap: float | None = None  # the logits x are softcap * tanh(x / softcap)
    temperature: float = 1.0  # the logits are divided by it, after the softcap
    chunk_bytes: int | None = None  # upper limit of the logits that exist at a time; None: what suits the device
    weight_grad_dtype: torch.dtype | None = None  # sums up a 16-bit weight's gradient: float32, or None, its own dtype
    shard: VocabularyShard | None = None  # what `weight` and `bias` are of a vocabulary that is split over processes

    @property
    def rows(self) -> tuple[int, float, float]:
        return self.ignore_index, check_scaling(self.softcap, self.temperature), float(self.temperature)


def from_logits(values: Values, sides: Sides, constants: Constants, options: Mapping[str, Any]) -> Tensor:  # []
    """mean_b values(log p of the labels)_b."""
    given = LogitsOptions(**options)
    check_sides("logits", sides)
    check_constants(sides, constants)
    arguments: list[Tensor] = []
    for logits, labels in sides.values():
        targets = next_labels(labels, given.ignore_index)
        arguments += [given.logprobs(logits, targets), targets != given.ignore_index]
    return mean(values(*arguments, *constants.values()))


def from_teacher_logits(
    values: Values,
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    label_penalty: float,
    options: Mapping[str, Any],
) -> Tensor:  # []
    """mean_b values(divergence of the rows from the teacher's)_b."""
    given = LogitsOptions(**options)
    check_sides("logits", {"": (logits, labels)})
    targets = next_labels(labels, given.ignore_index)
    kl = token_kl(logits, teacher, targets, label_penalty=label_penalty, **given._asdict())
    return mean(values(kl, targets != given.ignore_index))


def from_hidden(
    values: Values,
    sides: Sides,
    weight: Tensor,
    constants: Constants,
    options: Mapping[str, Any],
    unit: Unit = Unit.SEQUENCES,
) -> Tensor:  # []
    """`from_logits` of hidden @ weight.T + bias."""
    return mean_of_sequences(*plan(values, sides, weight, constants, LinearOptions(**options), unit))


def from_teacher_hidden(
    values: Values,
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    teacher: Head,
    label_penalty: float,
    options: Mapping[str, Any],
) -> Tensor:  # []
    """`from_teacher_logits` of hidden @ weight.T + bias, and as much of the teacher's."""
    given = LinearOptions(**options)
    if given.shard is not None:
        raise ValueError("shard must be None: losses against a teacher need the whole vocabulary in one process")
    call, head = plan(values, {"": (hidden, labels)}, weight, {}, given, Unit.ROW)
    (states,) = teacher.hidden
    _checks.floating("teacher_hidden", states)
    if states.shape[:-1] != labels.shape or states.device != hidden.device:
        raise ValueError(
            f"teacher_hidden has shape {_checks.shape(states)} on {states.device}: it must be [B, T, H'] on"
            f" {hidden.device} with the B and T of labels, {_checks.shape(labels)}"
        )
    _checks.lm_head("teacher_", states, teacher.weight, teacher.bias)
    if len(teacher.weight) != len(weight):
        raise ValueError(f"teacher_weight has V = {len(teacher.weight)} and weight V = {len(weight)}: they must agree")
    rows = TeacherRows(*given.rows, label_penalty)
    return mean_of_sequences(replace(call, rows=rows, teacher=teacher), head)


def plan(
    values: Values,
    sides: Sides,
    weight: Tensor,
    constants: Constants,
    options: LinearOptions,
    unit: Unit = Unit.SEQUENCES,
) -> tuple[MeanOfSequences, Head]:
    """What the engine is asked for, once every argument has been checked."""
    rows: Rows = LabelRows(*options.rows)
    check_sides("hidden", sides)
    check_constants(sides, constants)
    for prefix, (hidden, _) in sides.items():
        _checks.lm_head("", hidden, weight, options.bias, hidden_name=f"{prefix}hidden")
    _checks.accumulation(options.chunk_bytes, options.weight_grad_dtype, weight)
    targets = [next_labels(labels, options.ignore_index) for _, labels in sides.values()]
    if options.shard is not None:
        options.shard.check(weight, targets, options.ignore_index)
        rows = ShardedRows(LabelRows(*options.rows), options.shard)
    warn_if_slow(weight.device.type)
    call = MeanOfSequences(
        values=values,
        rows=rows,
        targets=targets,
        constants=tuple(constants.values()),
        divisor=max(1, len(targets[0])),
        ignore_index=options.ignore_index,
        chunk_bytes=options.chunk_bytes,
        weight_grad_dtype=options.weight_grad_dtype,
        unit=unit,
        shard=options.shard,
    )
    return call, Head([hidden for hidden, _ in sides.values()], weight, options.bias)


def mean(values: Tensor) -> Tensor:  # [B] -> []
    return values.sum() / max(values.numel(), 1)


def check_sides(kind: str, sides: Sides) -> None:
    """Checks the `kind` ("logits" or "hidden") of each side against its labels, and the sides against one another."""
    for prefix, (values, labels) in sides.items():
        name = prefix + kind
        if values.dim() != 3:
            raise ValueError(
                f"{name} has shape {_checks.shape(values)}: it must be [B, T, {'V' if kind == 'logits' else 'H'}]"
            )
        _checks.floating(name, values)
        _checks.labels_of_rows(f"{prefix}labels", labels, name, values)
    (first, (values, _)), *others = sides.items()
    for prefix, (other, _) in others:
        if len(values) != len(other):
            raise ValueError(
                f"{first}{kind} has B = {len(values)} and {prefix}{kind} B = {len(other)}: they must be the same"
            )


def check_constants(sides: Sides, constants: Constants) -> None:
    values = next(iter(sides.values()))[0]
    for name, constant in constants.items():
        _checks.floating(name, constant)
        if constant.shape != values.shape[:1]:
            raise ValueError(f"{name} has shape {_checks.shape(constant)}: it must be [B] with B = {len(values)}")
        if constant.device != values.device:
            raise ValueError(f"{name} is on {constant.device}: it must be on {values.device}, as the rest is")
        if constant.requires_grad:
            raise ValueError(f"{name} requires grad: it must be a constant, computed under torch.no_grad()")
