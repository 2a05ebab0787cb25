"""Diagonal Fisher information: exact for any module, and nothing of the model is changed."""

import warnings

import fisher_layers  # noqa: F401 (enters its cases)
import pytest
import torch
from fisher_models import CASES, Transformer
from torch import nn

from unlearn_fast import causal_lm_losses, classification_losses, diagonal_fisher, output_norm_losses


def one_example_at_a_time(model, batches, losses):
    """The definition: (1/N) sum_n (d loss_n / d theta)^2, in the model's dtype."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for x, y in batches:
        for n in range(len(y)):
            loss = losses(model, (x[n : n + 1], y[n : n + 1])).sum()
            used = {name: p for name, p in model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
            for name, grad in zip(used, grads, strict=True):
                if grad is not None:
                    sums[name] += grad.to_dense().square()
            count += 1
    return {name: total / count for name, total in sums.items()}


def relative_error(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def fisher(model, batches, losses=classification_losses, **options):
    return diagonal_fisher(model, batches, losses, progress=False, **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_against_single_examples_in_float64(name, dtype):
    torch.manual_seed(0)
    model, (x, y), slow = CASES[name]()
    model.eval()
    exact_x = x.double() if x.is_floating_point() else x
    truth = one_example_at_a_time(model.double(), [(exact_x, y)], classification_losses)
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = fisher(model, list(zip(x.split(3), y.split(3), strict=True)))
    assert list(ours) == [parameter for parameter, _ in model.named_parameters()]
    largest = max(float(t.norm()) for t in truth.values())
    for parameter, expected in truth.items():
        assert ours[parameter].dtype == torch.float32 and ours[parameter].shape == expected.shape
        if expected.norm() < 1e-10 * largest:  # mathematically zero, such as an attention key's bias
            assert ours[parameter].norm() < 1e-8 * largest, parameter
        else:
            assert relative_error(ours[parameter], expected) < (1e-5 if dtype == torch.float32 else 1e-6), parameter
    messages = [str(w.message) for w in caught]
    assert len(messages) == (1 if slow else 0), messages
    for parameter in slow:
        assert f"{parameter.rpartition('.')[0] or 'the model itself'} (" in messages[0]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_batch_size_and_order_do_not_matter(size):
    torch.manual_seed(0)
    model = Transformer(tied=True).eval()
    x, y = torch.randint(0, 11, (8, 7)), torch.randint(0, 11, (8,))
    expected = fisher(model, [(x, y)])
    order = torch.randperm(8)
    ours = fisher(model, zip(x[order].split(size), y[order].split(size), strict=True))  # an iterator, used once
    assert ours.examples == 8 and ours.batches == -(-8 // size)
    for name in expected:
        assert relative_error(ours[name], expected[name]) < 2e-5, name


def test_batch_mode_is_the_square_of_the_batch_mean():
    torch.manual_seed(0)
    model, (x, y), _ = CASES["convolutions"]()
    model.eval()
    ours = fisher(model, list(zip(x.split(2), y.split(2), strict=True)), mode="batch")
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for xb, yb in zip(x.split(2), y.split(2), strict=True):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(xb), yb), list(model.parameters()))
        for total, grad in zip(sums.values(), grads, strict=True):
            total += grad.pow(2) / 3
    assert ours.mode == "batch" and ours.batches == 3
    for name, expected in sums.items():
        assert relative_error(ours[name], expected) < 1e-6, name


def test_16_bit_models_accumulate_in_float32():
    torch.manual_seed(0)
    model = nn.Linear(4, 2).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.mul_(1e-3)
    x, y = torch.ones(600, 4, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.long)
    ours = fisher(model, list(zip(x.split(50), y.split(50), strict=True)))
    single = fisher(model, [(x[:1], y[:1])])
    # Sums in bfloat16 would stop growing after 256 equal terms.
    assert relative_error(ours["weight"], single["weight"]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_no_module_uses_are_not_lost(dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.big, self.small = nn.Linear(4, 3), nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.big(x) + 1e-2 * nn.functional.linear(x[:, :3], self.small.weight)

    torch.manual_seed(0)
    model, x, y = Model().to(dtype), torch.randn(4, 4, dtype=dtype), torch.tensor([0, 1, 2, 0])
    ours = fisher(model, [(x, y)])
    truth = one_example_at_a_time(model.double(), [(x.double(), y)], classification_losses)
    assert relative_error(ours["small.weight"], truth["small.weight"]) < 20 * torch.finfo(dtype).eps


def test_float16_squares_do_not_underflow():
    model = nn.Linear(1, 1, bias=False).half()
    x = torch.full((4, 1), 1e-4, dtype=torch.float16)  # a square of 1e-8 is 0 in float16
    ours = diagonal_fisher(model, [x], lambda m, b: m(b).squeeze(-1), progress=False)
    assert relative_error(ours["weight"], x[:1].double().square()) < 1e-3


def test_frozen_and_unused_parameters_have_importance_zero():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    batch = torch.randn(4, 3)

    def losses(m, x):
        return m["frozen"](torch.tanh(m["used"](x))).sum(-1)

    ours = diagonal_fisher(model, [batch], losses, progress=False)
    assert {name: bool(t.any()) for name, t in ours.items()} == {
        name: name.startswith("used") for name, _ in model.named_parameters()
    }
    assert not model["frozen"].weight.requires_grad and model["used"].weight.requires_grad


# -- what is restored --------------------------------------------------------------------------------------------------


def state(model):
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "values": [t.clone() for t in model.state_dict().values()],
    }


def assert_same_state(before, after):
    assert [before[k] for k in ("training", "requires_grad", "hooks")] == [
        after[k] for k in ("training", "requires_grad", "hooks")
    ]
    for key in ("grads", "values"):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True))


@pytest.mark.parametrize("mode", ["per_example", "batch"])
@pytest.mark.parametrize("failure", [None, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at_call", [0, 1, 2, 5])
def test_everything_is_restored(mode, failure, at_call):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 4))
    model[2].eval()  # a mixed state must come back as it was
    model.train(True)
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones(4, 144)
    model[0].register_forward_hook(lambda *_: None)
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
    before = state(model)
    calls = 0

    def losses(m, batch):
        nonlocal calls
        assert not any(module.training for module in m.modules())
        calls += 1
        if failure is not None and calls > at_call:
            raise failure
        return classification_losses(m, batch)

    run = lambda: diagonal_fisher(model, [(x, y)] * 6, losses, mode=mode, progress=False)  # noqa: E731
    if failure is None:
        with torch.no_grad():  # gradients are switched on inside
            run()
    else:
        with pytest.raises(failure):
            run()
    assert_same_state(before, state(model))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_batch_statistics_are_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="BatchNorm '1' uses the statistics of the batch"):
        fisher(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])


class TrainsInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.norm.train()(x))


def test_training_mode_inside_forward_is_refused():
    model = TrainsInForward()
    statistics = model.norm.running_mean.clone()
    with pytest.raises(ValueError, match="BatchNorm 'norm' uses the statistics of the batch"):
        fisher(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])
    assert torch.equal(model.norm.running_mean, statistics)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda m, b: m(b).mean(), r"losses returned shape \[\] for a batch of \d: it must return \[B\]"),
        (lambda m, b: m(b), r"losses returned shape \[\d, 2\] for a batch of"),
        (lambda m, b: 1.0, "losses returned a float"),
        (lambda m, b: m(b).detach().sum(-1), "losses depends on no parameter"),
    ],
)
@pytest.mark.parametrize("mode", ["per_example", "batch"])
def test_unfit_losses(losses, message, mode):
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(nn.Linear(3, 2), [torch.randn(4, 3)], losses, mode=mode, progress=False)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches held no examples"),
        ([torch.zeros(0, 3)], ValueError, "batches held no examples"),
        ([3.0], TypeError, "holds no tensor with a batch axis"),
    ],
)
def test_unfit_batches(batches, error, message):
    with pytest.raises(error, match=message):
        diagonal_fisher(nn.Linear(3, 2), batches, lambda m, b: m(b).sum(-1), progress=False)


# -- ready-made losses -------------------------------------------------------------------------------------------------


def test_classification_batches():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 4), torch.randn(6, 5), torch.randint(0, 4, (6,))
    expected = nn.functional.cross_entropy(model(x), y, reduction="none")
    coarse = torch.zeros(6, dtype=torch.long)
    for batch in ((x, y), [x, coarse, y], (x, y.int())):
        torch.testing.assert_close(classification_losses(model, batch), expected)

    class TakesNames(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, pixel_values):
            return {"logits": self.inner(pixel_values)}["logits"]

    for key in ("labels", "label", "y"):
        torch.testing.assert_close(classification_losses(TakesNames(), {"pixel_values": x, key: y}), expected)
    with pytest.raises(TypeError, match="the target must be under"):
        classification_losses(model, {"x": x})
    with pytest.raises(TypeError, match="must be"):
        classification_losses(model, x)


def test_output_norm_needs_no_labels():
    model, x = nn.Linear(5, 4), torch.randn(6, 5)
    expected = model(x).square().sum(-1)
    for batch in (x, (x, torch.zeros(6)), (x, None)):
        torch.testing.assert_close(output_norm_losses(model, batch), expected)


def test_causal_lm_losses_are_the_model_s_own_for_one_sequence():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (3, 9))
    labels = ids.clone()
    labels[0, :4], labels[2, 6:] = -100, -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    ours = causal_lm_losses(model, batch)
    assert ours.shape == (3,)
    for n in range(3):
        one = {name: t[n : n + 1] for name, t in batch.items()}
        torch.testing.assert_close(ours[n], model(**one).loss, rtol=1e-5, atol=0)
