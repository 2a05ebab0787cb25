"""The family of unlearning losses: both forms against the published formulas, and what each loss promises."""

import functools
import math

import pytest
import torch
from sequence_losses import (
    IGNORE,
    LOSSES,
    Loss,
    hidden_inputs,
    leaves,
    linear_loss,
    logits_inputs,
    logits_loss,
    with_gradients,
)
from torch import Tensor

import unlearn_fast
from unlearn_fast import reference

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
CAPS = {"plain": {}, "softcap": {"softcap": 2.0}, "both": {"softcap": 3.0, "temperature": 0.7}}
ONE_SIDED = [loss for loss in LOSSES if len(loss.sides) == 1]


def of(form, library, loss: Loss):
    return functools.partial(form, library, loss)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=rtol * float(expected[name].abs().max()), msg=name
        )


# Both forms are the published formula


@every_loss
@pytest.mark.parametrize("cap", CAPS)
def test_logits_form(loss, cap):
    inputs = logits_inputs(loss, hidden_inputs(loss))
    ours, exact = (with_gradients(of(logits_loss, lib, loss), inputs, **CAPS[cap]) for lib in (unlearn_fast, reference))
    assert_same(ours, exact)
    assert ours["value"].dtype == torch.float64 and ours["value"].shape == ()


@every_loss
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("rows", [1, 2, 5, 1000], ids="{} rows a chunk".format)
def test_linear_form(loss, cap, rows):
    """Chunks of one row, so that sequences are cut; of some sequences; of all."""
    inputs, chunk = hidden_inputs(loss), rows * 37 * 8
    ours = with_gradients(of(linear_loss, unlearn_fast, loss), inputs, chunk_bytes=chunk, **CAPS[cap])
    assert_same(ours, with_gradients(of(linear_loss, reference, loss), inputs, **CAPS[cap]))


@every_loss
def test_without_bias(loss):
    inputs = hidden_inputs(loss)
    del inputs["bias"]
    ours, exact = (with_gradients(of(linear_loss, lib, loss), inputs) for lib in (unlearn_fast, reference))
    assert_same(ours, exact)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [logits_loss, linear_loss])
def test_as_accurate_as_torch(loss, dtype, form):
    """Errors against float64, beside those of the reference formula in the same dtype."""
    inputs = hidden_inputs(loss, dtype, H=16, V=200)
    if form is logits_loss:
        inputs = logits_inputs(loss, inputs)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    options = {"weight_grad_dtype": torch.float32, "chunk_bytes": 5 * 200 * 4} if form is linear_loss else {}
    ours = with_gradients(of(form, unlearn_fast, loss), inputs, **options)
    torchs = with_gradients(of(form, reference, loss), inputs)
    exact = with_gradients(of(form, reference, loss), wide)
    for name, truth in exact.items():
        size = float(truth.abs().max())
        errors = [float((x[name].double() - truth).abs().max()) / size for x in (ours, torchs)]
        assert ours[name].dtype == (torch.float32 if name == "value" else dtype)
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32 if name == "value" else dtype).eps, name


@every_loss
def test_inplace_backward(loss):
    inputs = logits_inputs(loss, hidden_inputs(loss, torch.float32))
    expected = with_gradients(of(logits_loss, unlearn_fast, loss), inputs)

    def run(own):
        copies = {n: x * 1 if x.requires_grad else x for n, x in own.items()}  # a leaf may not be overwritten
        return logits_loss(unlearn_fast, loss, copies, inplace_backward=True)

    assert_same(with_gradients(run, inputs), expected, rtol=0)


# What a sequence adds


@every_loss
@pytest.mark.parametrize("library", [unlearn_fast, reference], ids=["ours", "reference"])
def test_nothing_labelled_is_zero(loss, library):
    inputs = hidden_inputs(loss, torch.float32)
    for name in inputs:
        if name.endswith("labels"):
            inputs[name].fill_(IGNORE)
    for form, arguments in ((linear_loss, inputs), (logits_loss, logits_inputs(loss, inputs))):
        results = with_gradients(of(form, library, loss), arguments)
        assert all((x == 0).all() for x in results.values())


@every_loss
def test_no_sequence_at_all(loss):
    inputs = {n: x if n in ("weight", "bias", "teacher_weight") else x[:0] for n, x in hidden_inputs(loss).items()}
    for form, arguments in ((linear_loss, inputs), (logits_loss, logits_inputs(loss, inputs))):
        results = with_gradients(of(form, unlearn_fast, loss), arguments)
        assert all((x == 0).all() for x in results.values())


@every_loss
def test_ignored_rows_count_for_nothing_whatever_they_hold(loss):
    inputs = hidden_inputs(loss)
    expected = with_gradients(of(linear_loss, unlearn_fast, loss), inputs)
    for prefix in loss.sides:
        labels = inputs[f"{prefix}labels"].roll(-1, 1)
        labels[:, -1] = IGNORE
        inputs[f"{prefix}hidden"][labels == IGNORE] = math.nan
    results = with_gradients(of(linear_loss, unlearn_fast, loss), inputs)
    assert_same(results, expected, rtol=0)
    for prefix in loss.sides:
        labels = inputs[f"{prefix}labels"].roll(-1, 1)
        labels[:, -1] = IGNORE
        assert (results[f"{prefix}hidden"][labels == IGNORE] == 0).all()


@pytest.mark.parametrize("loss", [x for x in LOSSES if "official" not in x.options.values()], ids=lambda x: x.title)
def test_the_mean_over_sequences(loss):
    """The whole batch is the mean of its sequences alone: micro-batches of equal size add up."""
    inputs, shared = hidden_inputs(loss), ("weight", "bias", "teacher_weight")
    whole = with_gradients(of(linear_loss, unlearn_fast, loss), inputs)
    parts = [
        with_gradients(
            of(linear_loss, unlearn_fast, loss), {n: x if n in shared else x[b : b + 1] for n, x in inputs.items()}
        )
        for b in range(5)
    ]
    for name, expected in whole.items():
        each = [part[name] / 5 for part in parts]
        torch.testing.assert_close(torch.cat(each) if name.endswith("hidden") else sum(each), expected)


@every_loss
def test_other_label_types(loss):
    inputs = hidden_inputs(loss)
    expected = with_gradients(of(linear_loss, unlearn_fast, loss), inputs)
    for name in inputs:
        if name.endswith("labels"):
            inputs[name] = inputs[name].masked_fill(inputs[name] == IGNORE, -1).int()
    assert_same(with_gradients(of(linear_loss, unlearn_fast, loss), inputs, ignore_index=-1), expected)


# What each loss promises


def token(logit: float) -> tuple[Tensor, Tensor]:
    """One sequence with one labelled token, whose logit is given; the other four are 0."""
    logits = torch.zeros(1, 2, 5, dtype=torch.float64)
    logits[0, 0, 2] = logit
    return logits.requires_grad_(), torch.tensor([[IGNORE, 2]])


FORGETTING = {
    "gradient_ascent_loss": {},
    "npo_loss": {"reference_logps": torch.tensor([-1.0])},
    "simnpo_loss": {},
    "wga_loss": {},
    "satimp_loss": {"beta1": 1.0, "beta2": 0.1},
    "ceu_loss": {},
}


@pytest.mark.parametrize("name", FORGETTING)
@pytest.mark.parametrize("logit", [-3.0, 0.0, 3.0])
def test_descent_lowers_the_probability(name, logit):
    logits, labels = token(logit)
    getattr(unlearn_fast, name)(logits, labels, **FORGETTING[name]).backward()
    assert logits.grad[0, 0, 2] > 0


@pytest.mark.parametrize("name", ["npo_loss", "simnpo_loss", "ceu_loss"])
def test_bounded_below(name):
    """Where the answer has been forgotten, nothing pushes any more."""
    logits, labels = token(-1000.0)
    loss = getattr(unlearn_fast, name)(logits, labels, **FORGETTING[name])
    loss.backward()
    assert 0 <= loss < 1e-12 and logits.grad.abs().max() < 1e-12


def test_npo_of_a_model_that_is_its_reference():
    """The first step: 2 / beta log 2, and the gradient of gradient ascent on the summed log-probability."""
    inputs = hidden_inputs(LOSSES[0])
    reference_logps = unlearn_fast.linear_sequence_logprobs(**inputs)
    own = leaves(inputs)
    loss = unlearn_fast.linear_npo_loss(**own, reference_logps=reference_logps, beta=0.5)
    torch.testing.assert_close(loss, torch.tensor(4 / 5 * 2 / 0.5 * math.log(2), dtype=torch.float64))  # one is empty
    logits = torch.nn.functional.linear(own["hidden"], own["weight"], own["bias"])
    ascent = unlearn_fast.sequence_logprobs(logits, own["labels"]).mean()
    gradients = [torch.autograd.grad(x, [own["hidden"], own["weight"]]) for x in (loss, ascent)]
    torch.testing.assert_close(*gradients)


def test_ceu_has_the_published_gradient():
    """p_y / (1 - p_y) * (onehot - p), also where p is next to 1 or to 0."""
    for logit in (-60.0, -3.0, 0.0, 3.0, 60.0):
        logits, labels = token(logit)
        unlearn_fast.ceu_loss(logits, labels).backward()
        p = logits.detach()[0, 0].softmax(-1)
        rest = 4 / (4 + math.exp(logit))  # 1 - p_y
        expected = -p[2] / rest * p
        expected[2] = p[2]
        torch.testing.assert_close(logits.grad[0, 0], expected, rtol=1e-12, atol=0)


def test_ceu_of_a_certain_token_is_finite():
    logits, labels = token(1e5)
    loss = unlearn_fast.ceu_loss(logits, labels)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_satimp_keeps_the_rest_of_confident_tokens():
    """The weight 1 - p is 4 exp(-40), which float32 probabilities have lost."""
    logits, labels = token(40.0)
    loss = unlearn_fast.satimp_loss(logits.float(), labels, beta1=1.0, beta2=1.0)
    assert float(loss.detach()) == pytest.approx(-((4 * math.exp(-40)) ** 2), rel=1e-5)


def test_the_teacher_itself_has_no_loss():
    inputs = hidden_inputs(LOSSES[0])
    student = leaves(inputs)
    teacher = {"teacher_hidden": inputs["hidden"], "teacher_weight": inputs["weight"], "teacher_bias": inputs["bias"]}
    loss = unlearn_fast.linear_kl_retain_loss(**student, **teacher)
    loss.backward()
    assert loss.abs() < 1e-14 and student["weight"].grad.abs().max() < 1e-14


def test_undial_lowers_the_label_by_its_strength():
    """The loss vanishes for the student whose label's logit is lower by the strength."""
    logits, labels = token(1.0)
    lowered = logits.detach().clone()
    lowered[0, 0, 2] -= 7
    assert unlearn_fast.undial_loss(lowered, labels, logits, strength=7.0) < 1e-14
    assert unlearn_fast.undial_loss(logits, labels, logits.detach(), strength=7.0) > 0.1


@pytest.mark.parametrize("cap", CAPS)
def test_reference_logprobs(cap):
    inputs = hidden_inputs(LOSSES[0])
    expected = reference.linear_sequence_logprobs(**inputs, **CAPS[cap])
    for chunk in (1, 1 << 20):
        ours = unlearn_fast.linear_sequence_logprobs(**leaves(inputs), chunk_bytes=chunk, **CAPS[cap])
        assert not ours.requires_grad
        torch.testing.assert_close(ours, expected)
    logits = logits_inputs(LOSSES[0], inputs)
    torch.testing.assert_close(unlearn_fast.sequence_logprobs(**logits, **CAPS[cap]), expected)
    assert expected[2] == 0  # nothing labelled


@every_loss
def test_logits_form_compiles_as_one_graph(loss):
    inputs = logits_inputs(loss, hidden_inputs(loss, torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(of(logits_loss, unlearn_fast, loss), fullgraph=True, backend="aot_eager")
    expected = with_gradients(of(logits_loss, unlearn_fast, loss), inputs)
    for name, result in with_gradients(compiled, inputs).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-7)
