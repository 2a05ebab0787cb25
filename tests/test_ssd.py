"""SSD end to end: against the authors' released code, its report, its warnings, and what it restores."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import unlearn_fast as uf
from unlearn_fast import Importance, classification_losses, diagonal_fisher, ssd_

GOLDEN = load_file(Path(__file__).parent / "data" / "ssd_official.safetensors")
ALPHA, LAM, FORGET_ROWS = 3.0, 1.0, 5  # as the file's metadata says


def golden(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in GOLDEN.items() if name.startswith(prefix)}


def released_model() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )
    model.load_state_dict(golden("model."))
    return model


def batches(rows: int | None, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(GOLDEN["x"][:rows].split(size), GOLDEN["y"][:rows].split(size), strict=True))


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def small_batches(n: int = 12, size: int = 4, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- against the released code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [FORGET_ROWS, None], ids=["forget", "reference"])
@pytest.mark.parametrize(
    ("run", "size", "mode"), [("batch1", 1, "per_example"), ("batch1", 1, "batch"), ("batch4", 4, "batch")]
)
def test_importance_is_the_released_code_s(run, size, mode, rows):
    name = "reference" if rows is None else "forget"
    importance = diagonal_fisher(
        released_model(), batches(rows, size), classification_losses, mode=mode, progress=False
    )
    for key, expected in golden(f"{run}.{name}.").items():
        error = (importance[key] - expected).norm() / expected.norm()
        assert error < 2e-6, (key, error)  # the released sums run over float32 batches too, in another order


@pytest.mark.parametrize("batch", [3, 5, 23])
def test_per_example_importance_is_that_of_batch_size_one_whatever_the_batch_size(batch):
    importance = diagonal_fisher(released_model(), batches(None, batch), classification_losses, progress=False)
    for key, expected in golden("batch1.reference.").items():
        assert (importance[key] - expected).norm() / expected.norm() < 2e-6, key


@pytest.mark.parametrize("run", ["batch1", "batch4"])
def test_dampening_is_bit_for_bit_the_released_code_s(run):
    model = released_model()
    sets = {
        name: Importance(golden(f"{run}.{name}."), examples=n, batches=n, mode="batch", fingerprint="released code")
        for name, n in (("forget", FORGET_ROWS), ("reference", 23))
    }
    with pytest.warns(UserWarning, match="measured on other weights"):
        ssd_(model, **sets, alpha=ALPHA, lam=LAM)
    for key, expected in golden(f"{run}.dampened.").items():
        assert torch.equal(model.state_dict()[key].view(torch.int32), expected.view(torch.int32)), key


@pytest.mark.parametrize(("run", "size", "mode"), [("batch1", 7, "per_example"), ("batch4", 4, "batch")])
def test_end_to_end_agrees_with_the_released_code(run, size, mode):
    model = released_model()
    report = ssd_(
        model,
        forget=batches(FORGET_ROWS, size),
        reference=batches(None, size),
        losses=classification_losses,
        alpha=ALPHA,
        lam=LAM,
        mode=mode,
        progress=False,
    )
    dampened = golden(f"{run}.dampened.")
    changed = sum(int((dampened[k] != GOLDEN[f"model.{k}"]).sum()) for k in dampened)
    # f and alpha * r may be equal but for rounding, where either decision is right: one element in a thousand at most.
    assert abs(report.total.selected - changed) <= report.total.elements / 1000
    for key, expected in dampened.items():
        differing = ~torch.isclose(model.state_dict()[key], expected, rtol=1e-4, atol=0)
        assert differing.float().mean() <= 1e-3, key


# -- what it does, and what it leaves alone ----------------------------------------------------------------------------


def test_report_counts_what_changed():
    model = small_model()
    before = values_of(model)
    report = ssd_(
        model,
        forget=small_batches(4),
        reference=small_batches(12, seed=2),
        losses=classification_losses,
        alpha=1.5,
        progress=False,
    )
    changed = {name: int((p.detach() != before[name]).sum()) for name, p in model.named_parameters()}
    assert {name: counts.selected for name, counts in report.parameters.items()} == changed
    assert report.total.selected == sum(changed.values()) > 0
    assert report.total.elements == sum(p.numel() for p in model.parameters())
    assert 0 < report.total.mean_factor < 1 / 1.5


def test_ready_importances_give_the_same_model_as_batches():
    sets = {"forget": small_batches(4), "reference": small_batches(12, seed=2)}
    one, two = small_model(), small_model()
    ssd_(one, **sets, losses=classification_losses, alpha=1.5, lam=0.7, exponent=2.0, cap=0.1, progress=False)
    ready = {k: diagonal_fisher(two, v, classification_losses, progress=False) for k, v in sets.items()}
    ssd_(two, **ready, alpha=1.5, lam=0.7, exponent=2.0, cap=0.1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_importances_of_two_modes_are_refused():
    model = small_model()
    before = values_of(model)
    ready = diagonal_fisher(model, small_batches(), classification_losses, mode="batch", progress=False)
    with pytest.raises(ValueError, match="forget has mode 'batch' and reference 'per_example'"):
        ssd_(model, forget=ready, reference=small_batches(), losses=classification_losses, alpha=1.0, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_settings_reach_the_dampening():
    expected, model = small_model(), small_model()
    sets = {"forget": small_batches(4), "reference": small_batches(12, seed=2)}
    ready = {k: diagonal_fisher(model, v, classification_losses, progress=False) for k, v in sets.items()}
    settings = {"alpha": 1.2, "lam": 3.0, "exponent": 0.5, "cap": 0.4}
    uf.reference.dampen_(expected, ready["forget"], ready["reference"], **settings)
    ssd_(model, **ready, **settings)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))
    plain = small_model()
    ssd_(plain, **ready, alpha=1.2)
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_structural_no_op_is_warned_with_both_numbers():
    model = small_model()
    before = values_of(model)
    with pytest.warns(UserWarning, match=r"0\.25 of it \(3 of 12 examples\) and 1 / alpha is 0\.1"):
        report = ssd_(
            model,
            forget=small_batches(12, size=3)[:1],
            reference=small_batches(12, size=3),
            losses=classification_losses,
            alpha=10.0,
            progress=False,
        )
    assert report.total.selected == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_importances_of_other_weights_are_warned():
    ready = diagonal_fisher(small_model(seed=3), small_batches(), classification_losses, progress=False)
    own = diagonal_fisher(small_model(), small_batches(seed=5), classification_losses, progress=False)
    with pytest.warns(UserWarning, match="forget: these importances were measured on other weights"):
        ssd_(small_model(), forget=ready, reference=own, alpha=0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha is -1.0: it must be >= 0"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"lam": "1"}, TypeError, "lam is '1': it must be a number"),
        ({"exponent": 0.0}, ValueError, "exponent is 0.0: it must be > 0"),
        ({"losses": None}, TypeError, "losses is missing"),
        ({"mode": "mean"}, ValueError, "mode is 'mean'"),
        ({"forget": []}, ValueError, "batches held no examples"),
    ],
)
def test_invalid_arguments_leave_the_model_untouched(change, error, message):
    model = small_model()
    before = values_of(model)
    arguments = {
        "forget": small_batches(4),
        "reference": small_batches(),
        "losses": classification_losses,
        "alpha": 1.0,
        "progress": False,
    }
    with pytest.raises(error, match=message):
        ssd_(model, **{**arguments, **change})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# -- importances on disk -----------------------------------------------------------------------------------------------


def test_importance_survives_a_round_trip(tmp_path):
    model = small_model()
    model[0].bias.requires_grad_(False)
    importance = diagonal_fisher(model, small_batches(), classification_losses, progress=False)
    importance.save(tmp_path / "fisher.safetensors")
    loaded = Importance.load(tmp_path / "fisher.safetensors")
    assert list(loaded) == list(importance) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(loaded[name], importance[name]) for name in importance)
    facts = ("examples", "batches", "mode", "fingerprint")
    assert [getattr(loaded, f) for f in facts] == [getattr(importance, f) for f in facts]
    assert (loaded.examples, loaded.batches, loaded.mode) == (12, 3, "per_example")
    assert [path.name for path in tmp_path.iterdir()] == ["fisher.safetensors"]  # no temporary is left


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "fisher.safetensors"
    importance = diagonal_fisher(small_model(), small_batches(), classification_losses, progress=False)
    importance.save(path)
    old = path.read_bytes()

    def fails(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        importance.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_load_refuses_other_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no importances"):
        Importance.load(tmp_path / "other.safetensors")
