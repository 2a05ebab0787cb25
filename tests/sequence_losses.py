"""Every sequence loss, its arguments, and random inputs: what the tests of the family go through."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Loss(NamedTuple):
    """The arguments of a loss, by name; sides first. Prefixed `linear_` it takes hidden states and a weight."""

    name: str
    sides: tuple[str, ...] = ("",)  # prefixes
    constants: tuple[str, ...] = ()  # [B]
    teacher: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012
    paired: bool = True  # two sides meet in one term

    @property
    def title(self) -> str:
        return ", ".join([self.name, *(str(v) for v in self.options.values())])


LOSSES = [
    Loss("gradient_ascent_loss"),
    Loss("grad_diff_loss", ("forget_", "retain_"), options={"retain_weight": 0.7}, paired=False),
    Loss("npo_loss", constants=("reference_logps",), options={"beta": 0.2}),
    Loss("simnpo_loss", options={"beta": 2.5, "delta": 0.3}),
    Loss(
        "dpo_loss",
        ("template_", "forget_"),
        ("template_reference_logps", "forget_reference_logps"),
        options={"beta": 0.3},
    ),
    Loss("wga_loss", options={"beta": 0.5}),
    Loss("satimp_loss", options={"beta1": 0.8, "beta2": 0.4}),
    Loss("ceu_loss"),
    Loss("kl_retain_loss", teacher=True),
    Loss("undial_loss", teacher=True, options={"strength": 3.0}),
    Loss("flat_loss", ("template_", "forget_"), options={"divergence": "kl"}, paired=False),
    Loss("flat_loss", ("template_", "forget_"), options={"divergence": "kl", "formulation": "official"}, paired=False),
]

LENGTHS = {"": [4, 1, 0, 6, 3], "template_": [3, 1, 2, 0, 5], "forget_": [4, 2, 0, 6, 3], "retain_": [1, 5, 4, 2, 3]}
T = {"": 9, "template_": 7, "forget_": 9, "retain_": 8}


def make_labels(prefix: str, V: int, generator: torch.Generator, lengths: list[int] | None = None) -> Tensor:
    """An ignored prompt, an answer, ignored padding; one sequence of a side has no answer."""
    lengths = LENGTHS[prefix] if lengths is None else lengths
    labels = torch.full((len(lengths), T[prefix]), IGNORE)
    for row, n in zip(labels, lengths, strict=True):
        start = 1 + int(torch.randint(T[prefix] - n, (), generator=generator))
        row[start : start + n] = torch.randint(V, (n,), generator=generator)
    return labels


def hidden_inputs(
    loss: Loss, dtype: torch.dtype = torch.float64, *, H: int = 6, V: int = 37, seed: int = 0
) -> dict[str, Tensor]:
    """The arguments of a loss's linear form, and "bias"."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    inputs: dict[str, Tensor] = {}
    for prefix in loss.sides:
        labels = make_labels(prefix, V, g)
        inputs[f"{prefix}hidden"] = normal(*labels.shape, H)
        inputs[f"{prefix}labels"] = labels
    inputs["weight"], inputs["bias"] = normal(V, H, scale=0.7), normal(V, scale=0.5)
    for name in loss.constants:
        inputs[name] = normal(len(labels)).abs().neg() * 9
    if loss.teacher:
        inputs["teacher_hidden"], inputs["teacher_weight"] = normal(*labels.shape, H - 1), normal(V, H - 1)
    return inputs


def linear_loss(library: Any, loss: Loss, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return getattr(library, f"linear_{loss.name}")(**inputs, **loss.options, **options)


def logits_inputs(loss: Loss, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of the form from logits, for the logits of those of the linear form."""
    head = {"weight": inputs["weight"], "bias": inputs.get("bias")}
    made: dict[str, Tensor] = {}
    for name, x in inputs.items():
        if name == "teacher_hidden":
            made["teacher_logits"] = x @ inputs["teacher_weight"].T
        elif name.endswith("hidden"):
            made[name.replace("hidden", "logits")] = torch.nn.functional.linear(x, **head)
        elif name.endswith(("labels", "logps")):
            made[name] = x
    return made


def logits_loss(library: Any, loss: Loss, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return getattr(library, loss.name)(**inputs, **loss.options, **options)


TEACHERS = ("teacher_hidden", "teacher_weight", "teacher_logits")


def differentiated(inputs: dict[str, Tensor]) -> list[str]:
    """The names of the arguments that have a gradient."""
    return [n for n in inputs if n.endswith(("hidden", "logits", "weight", "bias")) and n not in TEACHERS]


def leaves(inputs: dict[str, Tensor], frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    names = set(differentiated(inputs)) - set(frozen)
    return {n: x.detach().clone().requires_grad_() if n in names else x for n, x in inputs.items()}


def with_gradients(function: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The value, and the gradient of each differentiated input."""
    own = leaves(inputs)
    value = function(own, **options)
    names = [n for n in own if own[n].requires_grad]
    return {
        "value": value.detach(),
        **dict(zip(names, torch.autograd.grad(value, [own[n] for n in names]), strict=True)),
    }
