"""Measuring inside autocast, inference mode, torch.compile and checkpoints; batches of any type; memory; errors."""

import copy
import dataclasses
import gc
import warnings
from collections import UserDict

import pytest
import torch
from fisher_layers import Wiring
from fisher_models import CASES
from test_fisher import fisher, one_example_at_a_time, relative_error
from test_fisher_check import batches_of, labelled
from torch import nn

from unlearn_fast import classification_losses


def test_what_the_caller_does_wrong_is_raised_as_it_is():
    def losses(m, b):
        raise ZeroDivisionError("in the model")

    with pytest.raises(ZeroDivisionError, match="in the model"):
        fisher(nn.Linear(9, 4), batches_of(4), losses)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fisher(nn.Linear(8, 4), batches_of(4))


def test_embeddings_scaled_by_frequency_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"Embedding '0' has scale_grad_by_freq=True.*it must be False"):
        fisher(model, [labelled(torch.randint(0, 5, (3, 2)))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = nn.Sequential(
        nn.Linear(9, 16), nn.LayerNorm(16), nn.GELU(), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 6, 2), nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()  # fmt: skip
    batches = batches_of(6, 6)

    def losses(m, b):
        with torch.autocast("cpu", dtype):
            return classification_losses(m, b)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fisher(model, batches, losses)
    truth = one_example_at_a_time(model.double(), [(x.double(), y) for x, y in batches], classification_losses)
    for name, expected in truth.items():
        assert relative_error(ours[name], expected) < 0.1, name


def test_extra_memory_does_not_grow_with_the_batch(monkeypatch):
    """No tensor of [B, parameters] exists: the largest result of any operation stays that of the ordinary backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.untyped_storage().nbytes())
            return result

    model = nn.Sequential(nn.Linear(9, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 4))
    sizes = []
    for n in (8, 64):
        with Largest() as largest:
            fisher(model, batches_of(n))
        sizes.append(largest.size)
    assert sizes == [300 * 300 * 4] * 2


@pytest.mark.parametrize("name", CASES)
def test_memory_is_freed_without_the_garbage_collector(name):
    """A cycle would keep the activations of the check, and the gradients it compares with, for some time."""
    torch.manual_seed(0)
    model, batch, _ = CASES[name]()
    fisher(model.eval(), [batch])  # fills what is cached for good
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        fisher(model, [batch])
        gc.collect()
        held = [thing for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not held


def test_reentrant_checkpoints_go_one_example_at_a_time():
    """They know only a plain backward, whose gradients must not stay."""

    def forward(m, x):
        return m.head(
            torch.utils.checkpoint.checkpoint(lambda h: torch.tanh(m.inner(h)), m.first(x), use_reentrant=True)
        )

    model = Wiring(forward, first=nn.Linear(9, 6), inner=nn.Linear(6, 6), head=nn.Linear(6, 4)).eval()
    model.head.bias.grad = torch.ones(4)
    batches = batches_of(4, 3)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in batches:
        for n in range(len(y)):
            copied = copy.deepcopy(model)
            copied.zero_grad()
            classification_losses(copied, (x[n : n + 1], y[n : n + 1])).sum().backward()
            for name, p in copied.named_parameters():
                expected[name] += p.grad.square() / 7
    with pytest.warns(UserWarning, match="one example at a time"):
        ours = fisher(model, batches)
    for name, truth in expected.items():
        assert relative_error(ours[name], truth) < 1e-5, name
    assert torch.equal(model.head.bias.grad, torch.ones(4)) and model.head.weight.grad is None


def test_a_model_is_measured_once_at_a_time():
    """Inside, its parameters are switched off: the inner measurement would find nothing."""
    model = nn.Linear(9, 4)

    def losses(m, b):
        fisher(m, [b])
        return classification_losses(m, b)

    with pytest.raises(RuntimeError, match="the model is being measured already"):
        fisher(model, batches_of(4), losses)
    assert model.weight.requires_grad
    fisher(model, batches_of(4))


def test_complex_parameters_are_refused():
    model = Wiring(lambda m, x: (x.to(torch.cfloat) @ m.weight).abs(), weight=nn.Parameter(torch.randn(9, 4).cfloat()))
    with pytest.raises(TypeError, match=r"parameter 'weight' has dtype torch\.complex64"):
        fisher(model, batches_of(4))


def test_compiled_models_run_as_they_were_written():
    model, batches = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)), batches_of(4, 3)
    expected = fisher(model, batches)
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0][0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="measured one example at a time")
        ours = fisher(compiled, batches)
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), expected.values(), strict=True))


def test_inside_inference_mode():
    model, batches = nn.Linear(9, 4), batches_of(4)
    expected = fisher(model, batches)
    with torch.inference_mode():
        ours = fisher(model, batches)
    assert torch.equal(ours["weight"], expected["weight"])


class Encoding(UserDict):
    """Like a tokenizer's BatchEncoding: its values are attributes too."""

    def __getattr__(self, name):
        return self.data[name]


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "kept"


@pytest.mark.parametrize("wrap", [lambda x, y: Encoding(x=x, y=y), Record])
def test_batches_keep_their_type(wrap):
    """Here the layer in the middle has no rule, so that they are also cut into examples."""
    model = Wiring(lambda m, x: m.head(torch.tanh(m.middle(x, x))), middle=nn.Bilinear(9, 9, 5), head=nn.Linear(5, 4))

    def losses(m, b):
        assert type(b) in (Encoding, Record)
        return classification_losses(m, (b.x, b.y))

    batches = batches_of(4, 3)
    with pytest.warns(UserWarning, match=r"middle \(Bilinear\)"):
        ours = fisher(model, [wrap(x, y) for x, y in batches], losses)
    truth = one_example_at_a_time(model, batches, classification_losses)
    for name, expected in truth.items():
        assert relative_error(ours[name], expected) < 1e-5
