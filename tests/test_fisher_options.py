"""What there is beside the plain importances: labels, moments, early stop, progress."""

import functools
import math

import pytest
import torch
from fisher_models import CASES, vectors
from test_fisher import fisher, relative_error
from torch import nn

from unlearn_fast import (
    Importance,
    WeightedLosses,
    causal_lm_losses,
    classification_losses,
    diagonal_fisher,
)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def gradients(model, x, y):
    """Parameter -> [N, *shape]."""
    losses = classification_losses(model, (x, y))
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return {name: torch.stack(of_name) for name, of_name in zip(names, zip(*rows, strict=True), strict=True)}


# -- labels ------------------------------------------------------------------------------------------------------------


def test_all_labels_give_the_exact_fisher_information():
    """E over the model's own labels of the squared gradient, by the definition."""
    model = mlp()
    x = torch.randn(6, 9)
    probabilities = model(x).softmax(-1).detach()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for label in range(4):
        for name, g in gradients(model, x, torch.full((6,), label)).items():
            expected[name] += torch.einsum("n,n...->...", probabilities[:, label], g.square()) / 6
    losses = functools.partial(classification_losses, labels="all")
    for batches in ([x], [(x,)], list(x.split(4)), list(x.split(1))):
        ours = fisher(model, batches, losses)
        for name, truth in expected.items():
            assert relative_error(ours[name], truth) < 1e-5, name


def test_sampled_labels_come_from_the_model_and_repeat_with_the_seed():
    model = mlp()
    x = torch.randn(2, 9).repeat_interleave(2000, 0)
    losses = functools.partial(classification_losses, labels="sampled")
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(fisher(model, x.split(500), losses))
    exact = fisher(model, [x[::2000]], functools.partial(classification_losses, labels="all"))
    for name in exact:
        assert torch.equal(results[0][name], results[1][name])
        assert relative_error(results[0][name], exact[name]) < 0.1, name


def test_the_check_draws_the_same_labels_and_leaves_the_random_numbers_alone():
    model = mlp()
    x = torch.randn(8, 9)
    losses = functools.partial(classification_losses, labels="sampled")
    torch.manual_seed(3)
    ours = fisher(model, [x], losses)
    after = torch.rand(1)
    torch.manual_seed(3)
    labels = []
    fisher(model, [x], lambda m, b: labels.append(losses(m, b)) or labels[-1])
    torch.manual_seed(3)
    values = losses(model, x)
    assert torch.equal(after, torch.rand(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in values]
    for name, of_name in zip(names, zip(*rows, strict=True), strict=True):
        assert relative_error(ours[name], torch.stack(of_name).square().mean(0)) < 1e-5


def test_sampled_tokens():
    torch.manual_seed(0)
    model = Tokens()
    ids = torch.randint(0, 11, (4, 7))
    losses = functools.partial(causal_lm_losses, labels="sampled")
    torch.manual_seed(5)
    a = fisher(model, [{"input_ids": ids}], losses)
    torch.manual_seed(5)
    b = fisher(model, [{"input_ids": ids}], losses)
    true = fisher(model, [{"input_ids": ids}], causal_lm_losses)
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].any()
    assert any(not torch.equal(a[name], true[name]) for name in a)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.embed(input_ids)))


@pytest.mark.parametrize("losses", [classification_losses, causal_lm_losses])
def test_unknown_labels(losses):
    with pytest.raises(ValueError, match="labels is 'drawn': it must be one of 'true', 'sampled'"):
        losses(mlp(), vectors(), labels="drawn")


def test_weighted_losses_must_fit():
    model, x = mlp(), torch.randn(4, 9)
    for weights, message in (
        (lambda n: torch.ones(n, 2), r"both must be \[B, K\]"),
        (lambda n: torch.ones(n, 4, requires_grad=True), "detach them"),
    ):
        with pytest.raises(ValueError, match=message):
            fisher(model, [x], lambda m, b, w=weights: WeightedLosses(m(b), w(len(b))))


def test_example_weights():
    model, (x, y) = mlp(), vectors(6)
    w = torch.rand(6)
    batches = [(x, y, w)]

    def losses(m, b):
        values = nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")
        return WeightedLosses(values[:, None], b[2][:, None])

    ours = fisher(model, batches, losses, first_moment=True)
    for name, g in gradients(model, x, y).items():
        assert relative_error(ours[name], torch.einsum("n,n...->...", w, g.square()) / 6) < 1e-5
        assert relative_error(ours.first_moment[name], torch.einsum("n,n...->...", w, g) / 6) < 1e-5


# -- moments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["convolutions", "tied_transformer", "vision_transformer", "norms", "parametrized_weights",
             "one_weight_in_several_shapes", "raw_parameters_and_recurrence", "kernels_that_torch_does_not_show"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:measured one example")
def test_first_moments_variances_and_absolute_values(name):
    torch.manual_seed(0)
    model, (x, y), _ = CASES[name]()
    model.eval()
    batches = list(zip(x.split(3), y.split(3), strict=True))
    ours = fisher(model, batches, first_moment=True)
    absolute = fisher(model, batches, mode="absolute")
    assert absolute.mode == "absolute"
    model.double()
    wide = x.double() if x.is_floating_point() else x
    truth = gradients(model, wide, y)
    largest = max(float(g.norm()) for g in truth.values())
    variance = ours.variance()
    for key, g in truth.items():
        noise = 1e-7 * largest
        assert float((ours.first_moment[key].double() - g.mean(0)).norm()) < 1e-5 * float(g.norm()) + noise
        assert float((absolute[key].double() - g.abs().mean(0)).norm()) < 1e-5 * float(g.norm()) + noise
        expected = g.square().mean(0) - g.mean(0).square()
        assert float((variance[key].double() - expected).norm()) < 1e-5 * float(g.square().sum()) + noise


def test_moments_are_saved(tmp_path):
    model, batch = mlp(), vectors()
    model[0].bias.requires_grad_(False)
    ours = fisher(model, [batch], first_moment=True)
    ours.save(tmp_path / "importance")
    again = Importance.load(tmp_path / "importance")
    for name in ours:
        assert torch.equal(ours[name], again[name]) and torch.equal(ours.first_moment[name], again.first_moment[name])
    with pytest.raises(ValueError, match="no first moment"):
        fisher(model, [batch]).variance()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "exact"}, "mode is 'exact'"),
        ({"mode": "batch", "first_moment": True}, "first_moment is True in mode 'batch'"),
        ({"mode": "batch", "target_error": 0.1}, "target_error is 0.1, mode 'batch'"),
        ({"target_error": 0.0}, "target_error is 0.0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        fisher(mlp(), [vectors()], **options)


def test_batch_mode_has_the_bits_of_the_released_code():
    """The released code's operations, in their order: zeros, += grad.clone().pow(2), /= float(batches)."""
    torch.manual_seed(0)
    model, (x, y), _ = CASES["convolutions"]()
    model.eval()
    batches = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])]
    ours = fisher(model, batches, mode="batch")
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for xb, yb in batches:
        model.zero_grad()
        nn.CrossEntropyLoss()(model(xb), yb).backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad.data.clone().pow(2)
    for name, total in sums.items():
        total /= float(len(batches))
        assert torch.equal(ours[name], total), name


# -- early stop --------------------------------------------------------------------------------------------------------


def test_it_stops_when_the_importances_are_known_well_enough():
    model = mlp()
    torch.manual_seed(0)
    batches = [(torch.randn(20, 9), torch.randint(0, 4, (20,))) for _ in range(100)]
    everything = fisher(model, batches, target_error=1e-9)
    assert everything.examples == 2000
    stopped = fisher(model, batches, target_error=0.1)
    assert 80 <= stopped.examples < 2000 and stopped.relative_error <= 0.1
    reached = math.sqrt(
        sum(float((stopped[n] - everything[n]).square().sum()) for n in stopped)
        / sum(float(everything[n].square().sum()) for n in everything)
    )
    assert reached < 0.25
    plain = fisher(model, batches)
    assert plain.relative_error is None
    for name in plain:
        assert relative_error(everything[name], plain[name]) < 1e-6


def test_the_estimated_error_is_the_standard_error():
    """Against the spread of the estimate over many independent data sets."""
    model = mlp()
    torch.manual_seed(0)
    runs = [
        fisher(model, [(torch.randn(10, 9), torch.randint(0, 4, (10,))) for _ in range(12)], target_error=1e-9)
        for _ in range(60)
    ]
    stacked = [torch.cat([run[name].flatten() for name in run]) for run in runs]
    spread = torch.stack(stacked)
    actual = float(spread.var(0).sum().sqrt() / spread.mean(0).norm())
    estimated = sum(run.relative_error for run in runs) / len(runs)
    assert estimated == pytest.approx(actual, rel=0.15)


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def every_update_shown(monkeypatch):
    from tqdm.std import tqdm

    monkeypatch.setattr("tqdm.auto.tqdm", functools.partial(tqdm, mininterval=0))


@pytest.mark.usefixtures("every_update_shown")
def test_progress_counts_examples_and_knows_the_end(capsys):
    diagonal_fisher(mlp(), [vectors(4)] * 3, classification_losses)
    bar = capsys.readouterr().err
    assert "12/12" in bar and "examples/s" in bar
    diagonal_fisher(mlp(), iter([vectors(4)] * 3), classification_losses)
    assert "12 examples" in capsys.readouterr().err


@pytest.mark.usefixtures("every_update_shown")
def test_loader_of_a_data_set(capsys):
    x, y = vectors(10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    ours = diagonal_fisher(mlp(), loader, classification_losses)
    assert ours.examples == 10 and "/10 [" in capsys.readouterr().err
