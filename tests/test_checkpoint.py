"""Dampening on disk: the bits of `dampen_`, and every other byte as it was."""

import io
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    DTYPES,
    SETTINGS,
    contents,
    expected_bytes,
    importance,
    in_memory,
    run,
    trio,
    values,
    write_file,
    write_raw,
    write_shards,
)

from unlearn_fast import Importance, causal_lm_losses, checkpoint, dampen_, diagonal_fisher
from unlearn_fast.checkpoint import blocks, stream
from unlearn_fast.cli import main


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    monkeypatch.setattr(stream, "JOURNAL", 4 * 4096)


def assert_same_report(report, expected):
    """NaN is one value, and the mean may be summed in another order."""
    found, wanted = report.parameters, expected.parameters
    assert set(found) == set(wanted)
    for name, counts in wanted.items():
        assert found[name][:4] == counts[:4], name
        assert found[name].mean_factor == pytest.approx(counts.mean_factor, rel=1e-12, nan_ok=True), name


def every_mix():
    """Every dtype of parameter and importances; sizes around those of blocks and pieces."""
    model, forget, reference = {}, {}, {}
    sizes = itertools.cycle([1, 255, 256, 257, 1000, 5000])
    for i, (p, f, r) in enumerate(itertools.product(DTYPES, repeat=3)):
        name, shape = f"{p}.{f}.{r}", (next(sizes),)
        model[name] = values(*shape, dtype=DTYPES[p], seed=i)
        forget[name] = importance(*shape, dtype=DTYPES[f], seed=2 * i + 1)
        reference[name] = importance(*shape, dtype=DTYPES[r], seed=2 * i + 2)
    for name, shape in {"scalar": (), "empty": (0,), "empty matrix": (3, 0), "matrix": (40, 50)}.items():
        model[name], forget[name], reference[name] = values(*shape), torch.full(shape, 8.0), torch.full(shape, 0.5)
    model |= {"steps": torch.arange(700), "mask": torch.ones(33, dtype=torch.bool), "untouched": values(3000)}
    return model, forget, reference


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, {"alpha": 0.1, "lam": 5.0, "cap": 0.7}, {"alpha": 1.7, "lam": 1.3, "exponent": 2.5}],
    ids=str,
)
def test_every_mix_of_dtypes_bit_for_bit(tmp_path, small_blocks, settings):
    model, forget, reference = every_mix()
    file = write_file(tmp_path / "model.safetensors", model, {"format": "pt", "note": "kept"})
    f, r = write_file(tmp_path / "f", forget), write_file(tmp_path / "r", reference)
    report = run(file, f, r, tmp_path / "out", **settings)
    expected, expected_report = in_memory(model, forget, reference, **settings)
    assert (tmp_path / "out").read_bytes() == expected_bytes(file, expected)
    assert_same_report(report, expected_report)
    assert set(report.without_importance) == {"steps", "mask", "untouched"}
    assert report.total.selected > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "model.safetensors", "out", "r"]


@pytest.mark.parametrize("padding", range(9))
def test_data_in_any_order_and_at_any_address(tmp_path, small_blocks, padding):
    """The format does not promise that elements are aligned: then one may lie across the border of two blocks."""
    model, forget, reference = every_mix()
    names = list(model)
    random.Random(padding).shuffle(names)
    model = {"odd": torch.ones(3, dtype=torch.uint8)} | {name: model[name] for name in names}
    file = write_raw(tmp_path / "model", model, padding=padding)
    f, r = write_raw(tmp_path / "f", forget, padding=padding + 1), write_raw(tmp_path / "r", reference, padding=3)
    run(file, f, r, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected_bytes(file, in_memory(model, forget, reference, **SETTINGS)[0])


def test_default_blocks_and_the_least_memory(tmp_path):
    model, forget, reference = trio({"a": (1500, 1000), "b": (7,), "c": (300, 1001)})
    file = write_file(tmp_path / "model", model)
    f, r = write_file(tmp_path / "f", forget), write_file(tmp_path / "r", reference)
    expected = expected_bytes(file, in_memory(model, forget, reference, **SETTINGS)[0])
    run(file, f, r, tmp_path / "out")
    with pytest.raises(ValueError, match=r"memory is 1,000 bytes: it must be at least [\d,]+ for these") as refused:
        run(file, f, r, tmp_path / "small", memory=1000)
    least = int(str(refused.value).split("at least ")[1].split()[0].replace(",", ""))
    assert least < 16 << 20
    run(file, f, r, tmp_path / "small", memory=least)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "small").read_bytes() == expected


PEAK = """
import sys, torch
from pathlib import Path
from unlearn_fast import checkpoint, dampen_

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10

*paths, memory = sys.argv[1:]
dampen_([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], alpha=1.0)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
checkpoint.dampen(*paths, alpha=1.0, memory=int(memory), progress=False)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process")
def test_resident_memory_stays_below_the_limit(tmp_path):
    """Importances of other dtypes need the most: they are converted."""
    values = torch.rand(24 << 20, generator=torch.Generator().manual_seed(0))
    file = write_file(tmp_path / "model", {"a": values.bfloat16()})
    f, r = write_file(tmp_path / "f", {"a": values.half()}), write_file(tmp_path / "r", {"a": values.flip(0).double()})
    for memory in (16 << 20, 32 << 20):
        command = [sys.executable, "-c", PEAK, *map(str, (file, f, r, tmp_path / f"out{memory}", memory))]
        environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert int(done.stdout) < memory


def test_a_sharded_directory(tmp_path, small_blocks):
    shapes = {f"layers.{i}.weight": (30 + i, 70) for i in range(9)} | {"head": (), "norm": (64,)}
    model, forget, reference = trio(shapes, torch.bfloat16)
    names = list(model)
    model["ids"] = torch.arange(9)
    source = write_shards(
        tmp_path / "model", [{n: model[n] for n in part} for part in (names[:4], ["ids"], names[4:7], names[7:])]
    )
    f = write_shards(tmp_path / "f", [{f"module.{n}": forget[n] for n in part} for part in (names[5:], names[:5])])
    r = write_file(tmp_path / "r", reference)
    (source / "config.json").write_text('{"a": 1}')
    (source / "empty.txt").touch()
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.txt").write_bytes(b"x" * 10_000)
    (source / "model-00001-of-00004.safetensors").chmod(0o440)
    for old in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"):
        (source / old).write_bytes(b"weights that are to be forgotten")
    (source / ".git").mkdir()
    (source / ".git" / "object").write_bytes(b"old weights")
    before = contents(source)

    report = run(source, f, r, tmp_path / "out")
    expected, expected_report = in_memory(model, forget, reference, **SETTINGS)
    assert_same_report(report, expected_report)
    assert report.without_importance == ("ids",)
    assert set(report.files_left_out) == {
        "consolidated.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    }
    assert "left out" in str(report) and "pytorch_model.bin" in str(report)
    shards = {p.name: expected_bytes(p, expected) for p in source.glob("model-*.safetensors")}
    kept = {n: b for n, b in before.items() if n not in report.files_left_out and not n.startswith(".git")}
    assert contents(tmp_path / "out") == kept | shards
    assert len(shards) == 4 and contents(source) == before
    assert (tmp_path / "out" / "model-00001-of-00004.safetensors").stat().st_mode & 0o777 == 0o440


def test_a_directory_with_one_file(tmp_path, small_blocks):
    model, forget, reference = trio({"module.a": (100, 30), "b": (50,)})
    source = tmp_path / "model"
    source.mkdir()
    file = write_file(source / "model.safetensors", model)
    forget = {name.removeprefix("module."): t for name, t in forget.items()}
    reference = {name.removeprefix("module."): t for name, t in reference.items()}
    f, r = write_file(tmp_path / "f", forget), write_file(tmp_path / "r", reference)
    report = run(source, f, r, tmp_path / "out")
    assert set(report.names) == {"module.a", "b"}
    expected = expected_bytes(file, in_memory(model, forget, reference, **SETTINGS)[0])
    assert contents(tmp_path / "out") == {"model.safetensors": expected}


def test_importance_files(tmp_path, small_blocks):
    """Frozen parameters are 0 without data, and first moments are passed over."""
    model, forget, reference = trio({"a": (60, 70), "frozen": (500,), "once": (30, 30)})
    zero = torch.zeros(())
    forget["frozen"], reference["frozen"] = zero.expand(500), zero.expand(500)
    reference["once"] = zero.expand(30, 30)
    facts = {"examples": 8, "batches": 2, "mode": "per_example", "fingerprint": "x"}
    Importance(forget, first_moment={name: t.clone() for name, t in forget.items()}, **facts).save(tmp_path / "f")
    Importance(reference, **facts).save(tmp_path / "r")
    file = write_file(tmp_path / "model", model)
    report = run(file, tmp_path / "f", tmp_path / "r", tmp_path / "out")
    expected, expected_report = in_memory(model, forget, reference, **SETTINGS)
    assert (tmp_path / "out").read_bytes() == expected_bytes(file, expected)
    assert_same_report(report, expected_report)
    assert report.parameters["frozen"].selected == 0 and report.parameters["once"].selected > 0

    Importance(reference, **facts | {"mode": "batch"}).save(tmp_path / "other")
    with pytest.raises(ValueError, match="forget was measured in mode 'per_example' and reference in 'batch'"):
        run(file, tmp_path / "f", tmp_path / "other", tmp_path / "another out")


def test_dry_run_writes_nothing(tmp_path, small_blocks):
    model, forget, reference = trio({"a": (100, 30), "b": (50,)})
    file = write_file(tmp_path / "model", model)
    f, r = write_file(tmp_path / "f", forget), write_file(tmp_path / "r", reference)
    before = contents(tmp_path)
    reports = [run(file, f, r, out, dry_run=True) for out in (None, tmp_path / "out")]
    assert contents(tmp_path) == before
    assert_same_report(reports[0], run(file, f, r, tmp_path / "out"))
    assert_same_report(reports[1], reports[0])


def test_command(tmp_path, capsys):
    model, forget, reference = trio({"a": (100, 30), "b": (50,)})
    forget["b"].zero_()
    model["c"] = values(3)
    file = write_file(tmp_path / "model", model)
    f, r = write_file(tmp_path / "f", forget), write_file(tmp_path / "r", reference)
    command = ["dampen", *map(str, (file, "--forget", f, "--reference", r, "--alpha", 1, "--lam", "0.7"))]
    out = str(tmp_path / "out")
    assert main([*command, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("dampened ") and "1 parameters without importance" in captured.out
    assert captured.err == "" and not (tmp_path / "out").exists()
    assert main([*command, "--memory", "64MiB", "--json", "-o", out]) == 0
    result = json.loads(capsys.readouterr().out)
    expected, report = in_memory(model, forget, reference, **SETTINGS)
    assert (tmp_path / "out").read_bytes() == expected_bytes(file, expected)
    assert result["total"]["selected"] == report.total.selected
    assert result["parameters"]["a"]["elements"] == 3000
    assert result["parameters"]["b"] == {
        "elements": 50,
        "selected": 0,
        "non_finite": report.parameters["b"].non_finite,
        "non_finite_selected": 0,
        "mean_factor": None,
    }
    assert result["without_importance"] == ["c"] and result["files_left_out"] == []

    assert main([*command, "-o", out]) == 2
    assert (
        capsys.readouterr().err
        == f"unlearn_fast: dampen: out: {out!r} exists: nothing is overwritten, name another place\n"
    )
    for arguments, message in [
        ([], "-o is missing: it must name what is written, unless --dry-run is given"),
        (["-o", out + "2", "--memory", "lots"], "--memory is 'lots': it must be a number of bytes"),
        (["-o", out + "2", "--memory", "1KiB"], "memory is 1,024 bytes: it must be at least"),
        (["-o", out + "2", "--cap", "-1"], "cap is -1.0: it must be >= 0"),
        (["-o", str(tmp_path / "no" / "out")], "does not exist: make it first"),
    ]:
        assert main([*command, *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "model", "out", "r"]


def test_interrupted_command(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "dampen", interrupted)
    assert main(["dampen", "m", "--forget", "f", "--reference", "r", "--alpha", "1", "-o", "out"]) == 130
    assert capsys.readouterr().err == "unlearn_fast: dampen was stopped: the same command goes on from here\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("shown", "stream"), [(True, Terminal()), (False, Terminal()), (True, io.StringIO())])
def test_progress_is_shown_in_a_terminal_only(tmp_path, monkeypatch, shown, stream):
    tensors = zip(("model", "f", "r"), trio({"a": (5, 6)}), strict=True)
    files = [write_file(tmp_path / name, of) for name, of in tensors]
    monkeypatch.setattr(sys, "stderr", stream)
    run(*files, tmp_path / "out", progress=shown)
    if shown and stream.isatty():
        assert "dampen: " in stream.getvalue() and "B/s]" in stream.getvalue()
    else:
        assert stream.getvalue() == ""


def test_a_language_model_from_measurement_to_loading(tmp_path):
    """Saved in shards by transformers, with a tied head; the importances measured and saved by the library."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=60, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    found = {}
    for name in ("f", "r"):
        ids = torch.randint(0, 60, (4, 9))
        batches = [{"input_ids": ids, "labels": ids}]
        found[name] = diagonal_fisher(model, batches, causal_lm_losses, progress=False)
        found[name].save(tmp_path / name)
    run(tmp_path / "model", tmp_path / "f", tmp_path / "r", tmp_path / "out")
    report = dampen_(model, found["f"], found["r"], **SETTINGS)
    assert report.total.selected > 1000
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for (name, p), (_, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(p, q), name
