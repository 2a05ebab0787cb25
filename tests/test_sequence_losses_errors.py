"""The sequence losses: errors name the argument, and nothing is changed by an invalid call."""

import pytest
import torch
from sequence_losses import LOSSES, hidden_inputs, leaves, linear_loss, logits_inputs, logits_loss

import unlearn_fast

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
BY_NAME = {loss.name: loss for loss in LOSSES}
F = torch.zeros


def bad_sides(prefix: str, kind: str):
    """Changes of a side's arguments, and what the error says. Made inputs have B = 5."""
    values, labels = f"{prefix}{kind}", f"{prefix}labels"
    last = "V" if kind == "logits" else "H"
    return [
        ({values: F(45, 6)}, ValueError, rf"{values} has shape \[45, 6\]: it must be \[B, T, {last}\]"),
        ({values: F(5, 9, 6).long()}, TypeError, f"{values} has dtype torch.int64"),
        ({labels: F(5, 3).long()}, ValueError, rf"{labels} has shape \[5, 3\] and {values}"),
        ({labels: F(5, 9).bool()}, TypeError, f"{labels} has dtype torch.bool"),
    ]


@every_loss
def test_sides(loss):
    inputs = hidden_inputs(loss)
    for form, kind, arguments in (
        (linear_loss, "hidden", inputs),
        (logits_loss, "logits", logits_inputs(loss, inputs)),
    ):
        for prefix in loss.sides:
            for changes, error, message in bad_sides(prefix, kind):
                with pytest.raises(error, match=message):
                    form(unlearn_fast, loss, arguments | changes)


@pytest.mark.parametrize("loss", [x for x in LOSSES if len(x.sides) > 1], ids=lambda loss: loss.title)
def test_sides_of_different_size(loss):
    first, second = loss.sides
    inputs = hidden_inputs(loss)
    for form, kind, arguments in (
        (linear_loss, "hidden", inputs),
        (logits_loss, "logits", logits_inputs(loss, inputs)),
    ):
        fewer = {
            n: x[:3] if n.startswith(second) and n[len(second) :] in (kind, "labels") else x
            for n, x in arguments.items()
        }
        with pytest.raises(ValueError, match=f"{first}{kind} has B = 5 and {second}{kind} B = 3"):
            form(unlearn_fast, loss, fewer)


@every_loss
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": F(6, 37)}, r"weight has shape \[6, 37\]: it must be \[V, H\] with H = 6, as in {hidden}"),
        ({"weight": F(37)}, r"weight has shape \[37\]"),
        ({"bias": F(36)}, r"bias has shape \[36\]: it must be \[V\] with V = 37"),
        (
            {"weight": F(37, 6).half()},
            "weight is torch.float16 on cpu: it must be torch.float64 on cpu, as {hidden} is",
        ),
        ({"bias": F(37)}, "bias is torch.float32"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0: it must be at least 1"),
        (
            {"weight_grad_dtype": torch.float32},
            "weight_grad_dtype is torch.float32: it must be None or torch.float64$",
        ),
        ({"softcap": -1.0}, "softcap is -1.0: it must be finite and above 0"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be finite and above 0"),
    ],
    ids=str,
)
def test_head_and_options(loss, changes, message):
    inputs = leaves(hidden_inputs(loss))
    with pytest.raises(ValueError, match=message.replace("{hidden}", f"{loss.sides[0]}hidden")):
        linear_loss(unlearn_fast, loss, inputs | changes)
    assert all(x.grad is None for x in inputs.values())


@pytest.mark.parametrize(("option", "value"), [("softcap", 0.0), ("softcap", float("nan")), ("temperature", -1.0)])
@every_loss
def test_options_of_the_logits_form(loss, option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}: it must be finite and above 0"):
        logits_loss(unlearn_fast, loss, logits_inputs(loss, hidden_inputs(loss)), **{option: value})


@every_loss
def test_an_unknown_option(loss):
    inputs = hidden_inputs(loss)
    for form, arguments in ((linear_loss, inputs), (logits_loss, logits_inputs(loss, inputs))):
        with pytest.raises(TypeError, match="unexpected keyword argument 'chunk_byte'"):
            form(unlearn_fast, loss, arguments, chunk_byte=1)


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.constants], ids=lambda loss: loss.title)
def test_reference_logps(loss):
    inputs = hidden_inputs(loss)
    for name in loss.constants:
        for bad, error, message in [
            (F(4), ValueError, rf"{name} has shape \[4\]: it must be \[B\] with B = 5"),
            (F(5).long(), TypeError, f"{name} has dtype torch.int64"),
            (F(5, device="meta"), ValueError, f"{name} is on meta: it must be on cpu"),
            (F(5).requires_grad_(), ValueError, f"{name} requires grad: it must be a constant"),
        ]:
            for form, arguments in ((linear_loss, inputs), (logits_loss, logits_inputs(loss, inputs))):
                with pytest.raises(error, match=message):
                    form(unlearn_fast, loss, arguments | {name: bad})


@pytest.mark.parametrize("name", ["npo_loss", "simnpo_loss", "dpo_loss"])
def test_beta(name):
    loss = BY_NAME[name]
    with pytest.raises(ValueError, match=r"beta is 0\.0: it must be positive"):
        linear_loss(unlearn_fast, loss._replace(options={"beta": 0.0}), hidden_inputs(loss))


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.teacher], ids=lambda loss: loss.title)
def test_teachers(loss):
    inputs = hidden_inputs(loss)
    for changes, error, message in [
        ({"teacher_hidden": F(5, 9, 5).long()}, TypeError, "teacher_hidden has dtype torch.int64"),
        ({"teacher_hidden": F(5, 8, 5)}, ValueError, r"teacher_hidden has shape \[5, 8, 5\].*labels, \[5, 9\]"),
        ({"teacher_weight": F(37, 4).double()}, ValueError, r"teacher_weight has shape \[37, 4\].*H = 5"),
        ({"teacher_weight": F(37, 5)}, ValueError, "teacher_weight is torch.float32.*as teacher_hidden is"),
        ({"teacher_weight": F(36, 5).double()}, ValueError, "teacher_weight has V = 36 and weight V = 37"),
        ({"teacher_bias": F(36).double()}, ValueError, r"teacher_bias has shape \[36\]"),
    ]:
        with pytest.raises(error, match=message):
            linear_loss(unlearn_fast, loss, inputs | changes)
    for bad, error, message in [
        (F(5, 9, 36), ValueError, r"teacher_logits has shape \[5, 9, 36\]: it must be \[5, 9, 37\]"),
        (F(5, 9, 37).int(), TypeError, "teacher_logits has dtype torch.int32"),
    ]:
        with pytest.raises(error, match=message):
            logits_loss(unlearn_fast, loss, logits_inputs(loss, inputs) | {"teacher_logits": bad})


@every_loss
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_a_label_outside_the_vocabulary(loss, chunk_bytes):
    inputs = hidden_inputs(loss)
    inputs[f"{loss.sides[0]}labels"][1, 2] = 37
    for form, arguments, options in (
        (linear_loss, inputs, {"chunk_bytes": chunk_bytes}),
        (logits_loss, logits_inputs(loss, inputs), {}),
    ):
        with pytest.raises(RuntimeError, match="labels holds 37 at row"):
            form(unlearn_fast, loss, arguments, **options)
