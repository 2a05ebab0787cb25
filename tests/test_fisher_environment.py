"""Measuring inside autocast, inference mode, torch.compile and checkpoints; batches of any type; memory; errors."""

import copy
import dataclasses
import gc
import warnings
import weakref
from collections import UserDict

import pytest
import torch
from fisher_layers import Wiring, parameter
from fisher_models import CASES
from test_fisher import fisher, one_example_at_a_time, relative_error
from test_fisher_check import assert_exact, batches_of, labelled
from torch import nn

from unlearn_fast import classification_losses, diagonal_fisher
from unlearn_fast.fisher.checking import Comparison
from unlearn_fast.fisher.tracing import Trace


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


@pytest.mark.parametrize("late", ["linear", "convolution", "group_norm", "instance_norm", "layer_norm", "scaled"])
def test_inputs_are_freed_as_the_backward_passes(late):
    """As in an ordinary one: when the gradient reaches the first layer, those of the later ones are gone."""
    layers = {
        "linear": nn.Linear(8, 8),
        "convolution": nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Conv1d(4, 4, 1), nn.Flatten()),
        "group_norm": nn.GroupNorm(2, 8),
        "instance_norm": nn.Sequential(nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, affine=True), nn.Flatten()),
        "layer_norm": nn.LayerNorm(8),
        "scaled": Wiring(lambda m, x: x * m.gain, gain=parameter(8)),
    }
    alive = []

    def forward(m, x):
        first = m.first(x)
        inside = torch.sin(torch.tanh(first)) + 0  # no function needs its own result
        held = weakref.ref(inside)
        if first.requires_grad:
            first.register_hook(lambda gradient: alive.append(held() is not None))
        return m.head(torch.sin(m.late(inside)))

    model = Wiring(forward, first=nn.Linear(9, 8), late=layers[late], head=nn.Linear(8, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher(model, batches_of(4))
    assert len(alive) >= 3 and not alive[-1]


@pytest.mark.parametrize("name", CASES)
def test_memory_is_freed_without_the_garbage_collector(name):
    """A cycle would keep the activations of the check, and the gradients it compares with, for some time."""
    torch.manual_seed(0)
    model, batch, _ = CASES[name]()
    fisher(model.eval(), [batch])  # fills what is cached for good
    while gc.collect():  # what other tests left
        pass
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        fisher(model, [batch])
        gc.collect()
        held = [thing for thing in gc.garbage if isinstance(thing, (Trace, Comparison))]
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


@pytest.mark.parametrize("view", ["unfold", "expand", "as_strided"])
def test_views_whose_elements_are_one(view):
    """Their gradients are added before they are squared."""
    views = {
        "unfold": lambda p: p.unfold(0, 9, 1),
        "expand": lambda p: p[:9].expand(6, 9),
        "as_strided": lambda p: p.as_strided((6, 9), (1, 1)),
    }
    model = Wiring(
        lambda m, x: m.head(torch.tanh(nn.functional.linear(x, views[view](m.values)))), values=parameter(14)
    )
    model.head = nn.Linear(6, 4)
    assert not assert_exact(model, batches_of(5, 3))


def test_hooks_on_gradients_count():
    """Here one that clips, which only the second batch shows."""
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    model[0].weight.register_hook(lambda g: g.clamp(-0.5, 0.5))
    batches = batches_of(5, 5)
    batches[1][0].mul_(20)
    truth = one_example_at_a_time(model, batches, classification_losses)
    with pytest.warns(UserWarning, match=r"0 \(Linear\): it has a hook on its gradient"):
        ours = fisher(model, batches)
    assert all(relative_error(ours[name], expected) < 1e-5 for name, expected in truth.items())


def test_batches_stay_the_callers():
    """A forward that changes its input in place, and losses that take things out of a mapping."""

    def forward(m, x):
        x -= 0.3
        return m.head(x)

    def losses(m, batch):
        return classification_losses(m, (batch.pop("x"), batch.pop("y")))

    model = Wiring(forward, head=nn.Linear(9, 4))
    batches = batches_of(5, 4)
    truth = one_example_at_a_time(model, [(x.clone(), y) for x, y in batches], classification_losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fisher(model, [{"x": x, "y": y} for x, y in batches], losses)
    assert all(relative_error(ours[name], expected) < 1e-5 for name, expected in truth.items())


def test_parts_and_wrappers_of_a_measured_model_are_refused():
    model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 4))

    def losses(m, b):
        for other in (nn.Sequential(m), m[0]):
            with pytest.raises(RuntimeError, match="being measured already"):
                fisher(other, [b])
        return classification_losses(m, b)

    fisher(model, batches_of(4), losses)


def test_modules_that_do_more_than_set_a_flag_are_put_back():
    """Like low-rank adapters that are merged in eval mode."""

    class Merging(nn.Linear):
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(9, 6), nn.Dropout(), nn.Linear(6, 4)).train()
    model[1].eval()
    fisher(model, batches_of(4))
    assert not model[0].merged and [module.training for module in model] == [True, False, True]


def test_requires_grad_comes_back_where_train_fails():
    class Failing(nn.Linear):
        def train(self, mode=True):
            if mode:
                raise ZeroDivisionError("in train")
            return super().train(mode)

    model = nn.Sequential(Failing(9, 6), nn.Dropout(), nn.Linear(6, 4))
    with pytest.raises(ZeroDivisionError, match="in train"):
        fisher(model, batches_of(4))
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


def test_optimizer_steps_inside_a_backward_are_refused():
    """Reentrant checkpoints would run them, and train the model."""

    def forward(m, x):
        return m.head(torch.utils.checkpoint.checkpoint(m.inner, m.first(x), use_reentrant=True))

    model = Wiring(forward, first=nn.Linear(9, 6), inner=nn.Linear(6, 6), head=nn.Linear(6, 4))
    before = model.inner.weight.clone()
    model.inner.weight.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="hook after the accumulation of its gradient"):
        fisher(model, batches_of(4))
    assert torch.equal(model.inner.weight, before)


def test_losses_that_draw_random_numbers():
    """A diffusion loss: alone, an example gets other noise."""

    def losses(m, batch):
        noise = torch.randn_like(batch[0])
        level = torch.rand(len(noise), 1)
        return (m(torch.cat([batch[0] + level * noise, level], 1)) - noise).square().mean(1)

    model = nn.Sequential(nn.Linear(10, 16), nn.SiLU(), nn.Linear(16, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher(model, batches_of(6, 6), losses)


def test_sums_keep_no_graph():
    """Parameters that are joined in one value, as by a penalty on their norms, are settled after the backward."""
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4))

    def losses(m, batch):
        return classification_losses(m, batch) + sum(p.square().sum() for p in m.parameters())

    assert not any(t.requires_grad for t in fisher(model, batches_of(4, 4), losses).values())


def test_loader_of_a_stream():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ((torch.ones(9), i % 4) for i in range(10))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    assert diagonal_fisher(nn.Linear(9, 4), loader, classification_losses, progress=True).examples == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_in_place_on_values_of_parameters(dtype):
    """And a layer in float32 in the middle of 16 bits, as adapters are."""

    def forward(m, x):
        bias = nn.functional.relu(m.table @ m.mix, inplace=True)
        return m.head(torch.tanh(m.inner(x.to(dtype)) + bias).float() @ m.adapter).to(dtype)

    model = Wiring(
        forward, inner=nn.Linear(9, 6).to(dtype), table=nn.Parameter(torch.randn(6).to(dtype)),
        mix=nn.Parameter(torch.randn(6, 6).to(dtype)), adapter=parameter(6, 6), head=nn.Linear(6, 4),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher(model, batches_of(6, 6))


@pytest.mark.parametrize("name", ["norms", "norms_of_vectors_and_volumes", "transformer"])
def test_norms_in_a_small_workspace(name, monkeypatch):
    """Their normalised inputs are made some examples at a time: here, of one."""
    torch.manual_seed(0)
    model, batch, _ = CASES[name]()
    expected = fisher(model.eval(), [batch])
    monkeypatch.setattr("unlearn_fast.fisher.gradients.WORKSPACE_BYTES", 1)
    ours = fisher(model, [batch])
    assert all(relative_error(ours[name], truth) < 1e-5 or not truth.any() for name, truth in expected.items())
