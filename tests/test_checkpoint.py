"""Dampening on disk: the bits of `dampen_`, and every other byte as it was; what is refused, and how it is said."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    DTYPES,
    contents,
    expected_bytes,
    importance,
    in_memory,
    trio,
    values,
    write_file,
    write_raw,
    write_shards,
)

from unlearn_fast import Importance, checkpoint
from unlearn_fast.checkpoint import blocks, stream
from unlearn_fast.checkpoint.safetensors_file import BITS
from unlearn_fast.cli import main

SETTINGS = {"alpha": 1.0, "lam": 0.7}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    monkeypatch.setattr(stream, "JOURNAL", 4 * 4096)


def run(model, forget, reference, out, **options):
    return checkpoint.dampen(model, forget, reference, out, **{**SETTINGS, "progress": False, **options})


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
    assert set(report.left_out) == {"consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert "left out" in str(report) and "pytorch_model.bin" in str(report)
    shards = {p.name: expected_bytes(p, expected) for p in source.glob("model-*.safetensors")}
    kept = {n: b for n, b in before.items() if n not in report.left_out and not n.startswith(".git")}
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
    assert result["without_importance"] == ["c"] and result["left_out"] == []

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


# What is refused: the error tells what and why, and nothing is written


@pytest.fixture
def files(tmp_path):
    """Paths of a model with a float and an integer tensor, and of importances, free to be spoilt."""
    folder = tmp_path / "files"
    folder.mkdir()
    model, forget, reference = trio({"a": (4, 5), "b": (3,)})
    model["ids"] = torch.arange(3)
    return {
        "model": write_raw(folder / "model", model),
        "forget": write_raw(folder / "forget", forget),
        "reference": write_raw(folder / "reference", reference),
    }


def assert_refused(files, out, error, message, **options):
    folder = next(iter(files.values())).parent
    before, beside = contents(folder), sorted(out.parent.iterdir()) if out.parent.exists() else None
    with pytest.raises(error) as refused:
        run(files["model"], files["forget"], files["reference"], out, **options)
    assert message in (refused.value.strerror or str(refused.value) if error is OSError else str(refused.value))
    assert contents(folder) == before
    assert beside is None or sorted(out.parent.iterdir()) == beside


@pytest.mark.parametrize(
    ("which", "tensors", "error", "message"),
    [
        ("forget", {"a": (4, 5)}, ValueError, "forget has no importance for 'b', and the other set has"),
        ("reference", {"b": (3,)}, ValueError, "reference has no importance for 'a', and the other set has"),
        ("forget", {"a": (4, 5), "x": (3,)}, ValueError, "forget has 'x': the model has no tensor of that name"),
        ("forget", {"a": (5, 4), "b": (3,)}, ValueError, "forget['a'] has shape [5, 4]: it must have the parameter's"),
        (
            "reference",
            {"a": (4, 5), "b": ()},
            ValueError,
            "reference['b'] has shape []: it must have the parameter's, [3]",
        ),
        ("forget", {}, ValueError, "holds no importances"),
        ("forget", {"a": (4, 5), "module.a": (4, 5)}, ValueError, "two importances for 'a', one as 'module.a'"),
    ],
)
def test_names_and_shapes(files, tmp_path, which, tensors, error, message):
    write_raw(files[which], {name: torch.ones(shape) for name, shape in tensors.items()})
    assert_refused(files, tmp_path / "out", error, message)


def test_dtypes(files, tmp_path):
    write_raw(files["forget"], {"a": torch.ones(4, 5, dtype=torch.int64), "b": torch.ones(3)})
    assert_refused(files, tmp_path / "out", TypeError, "forget['a'] is I64: it must be F64, F32, F16 or BF16")
    for which in ("forget", "reference"):
        write_raw(files[which], {"ids": torch.ones(3)})
    assert_refused(files, tmp_path / "out", TypeError, "model['ids'] is I64, and has an importance: only F64")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha is -1.0: it must be >= 0"),
        ({"alpha": "10"}, TypeError, "alpha is '10': it must be a number"),
        ({"exponent": 0.0}, ValueError, "exponent is 0.0: it must be > 0"),
        ({"memory": 10}, ValueError, "memory is 10 bytes: it must be at least"),
        ({"memory": "1GB"}, TypeError, "memory is '1GB': it must be a number of bytes"),
    ],
)
def test_settings(files, tmp_path, options, error, message):
    assert_refused(files, tmp_path / "out", error, message, **options)


def test_out(files, tmp_path, monkeypatch):
    model = files["model"]
    assert_refused(files, model, FileExistsError, f"out: {str(model)!r} exists: nothing is overwritten")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert_refused(files, tmp_path / "dangling", FileExistsError, "exists")
    assert_refused(files, tmp_path / "no" / "out", FileNotFoundError, "does not exist: make it first")
    with pytest.raises(TypeError, match="out is None"):
        run(model, files["forget"], files["reference"], None)
    folder = write_shards(tmp_path / "folder", [{"a": torch.ones(4, 5), "b": torch.ones(3)}])
    assert_refused(files | {"model": folder}, folder / "out", ValueError, "lies in model, which stays as it is")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    size = f"{model.stat().st_size:,}"
    assert_refused(files, tmp_path / "out", OSError, f"out: {size} bytes are needed on the disk of")


def test_missing_inputs(files, tmp_path):
    for which in files:
        gone = files | {which: tmp_path / "gone"}
        assert_refused(gone, tmp_path / "out", FileNotFoundError, f"{which}: {str(tmp_path / 'gone')!r} does not exist")
    (tmp_path / "bare").mkdir()
    bare = files | {"model": tmp_path / "bare"}
    assert_refused(bare, tmp_path / "out", FileNotFoundError, "holds neither model.safetensors.index.json nor")


def record(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS = {  # of 32 bytes of data
    "overlap": ({"a": record(0, 20), "b": record(16, 32)}, "the data of 'b' overlap those in front of it"),
    "hole": ({"a": record(0, 12), "b": record(16, 32)}, "the data of 'b' leave a hole after those in front of it"),
    "hole in front": ({"a": record(4, 32)}, "the data of 'a' leave a hole"),
    "truncated": ({"a": record(0, 36)}, "bytes, and it has"),
    "more data": ({"a": record(0, 28)}, "something follows its data"),
    "shape": ({"a": record(0, 32, shape=[9])}, "'a' has 32 bytes of data: F32 of shape [9] needs 36"),
    "half bytes": ({"a": record(0, 32, "F4", [65])}, "F4 of shape [65] needs 32.5"),
    "dtype": ({"a": record(0, 32, "F12")}, "'a' has the unknown dtype 'F12': known are F64"),
    "negative": ({"a": record(0, 32, shape=[-8])}, "'a' has shape [-8]: it must be a list of integers >= 0"),
    "fraction": ({"a": record(0, 32, shape=[8.0])}, "'a' has shape [8.0]"),
    "offsets": ({"a": record(0, 32) | {"data_offsets": [32, 0]}}, "'a' has data_offsets [32, 0]"),
    "one offset": ({"a": record(0, 32) | {"data_offsets": [32]}}, "'a' has data_offsets [32]"),
    "no dtype": ({"a": {"shape": [8], "data_offsets": [0, 32]}}, "'a' must have exactly dtype, shape and"),
    "metadata": ({"a": record(0, 32), "__metadata__": {"n": 1}}, "its __metadata__ must map strings to strings"),
    "list": ([1, 2], "its header is no JSON object"),
    "bad JSON": (b'{"a": ', "its header is no JSON ("),
    "nesting": (b"[" * 100_000, "its header is no JSON ("),
    "not UTF-8": (b'{"\xff": 1}', "its header is no JSON ("),
    "twice": (
        b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}, "a": 1}',
        "its header is no JSON (the name 'a' occurs twice)",
    ),
}


@pytest.mark.parametrize("which", ["model", "forget", "reference"])
@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(files, tmp_path, which, case):
    header, message = HEADERS[case]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    files[which].write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(32))
    assert_refused(
        files, tmp_path / "out", ValueError, f"{which}: {str(files[which])!r} is no valid safetensors file: "
    )
    assert_refused(files, tmp_path / "out", ValueError, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes, and the length of its header alone takes 8"),
        (b"1234567", "it has 7 bytes"),
        ((10**9).to_bytes(8, "little") + b"{}", "its header would have 1,000,000,000 bytes, and the format allows"),
        ((2**63 + 1).to_bytes(8, "little") + b"{}", "and the format allows 100,000,000"),
        ((50).to_bytes(8, "little") + b"{}", "its header would have 50 bytes, and the file has 10: it is truncated"),
    ],
)
def test_damaged_lengths(files, tmp_path, content, message):
    files["model"].write_bytes(content)
    assert_refused(files, tmp_path / "out", ValueError, message)


def test_every_truncation_is_found(files, tmp_path):
    whole = files["model"].read_bytes()
    for size in range(len(whole)):
        files["model"].write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is no valid safetensors file"):
            run(files["model"], files["forget"], files["reference"], tmp_path / "out")


def test_known_dtypes_are_those_of_safetensors():
    """Its own message lists them."""
    from safetensors import SafetensorError, deserialize

    raw = json.dumps({"a": record(0, 32, "F12")}).encode()
    with pytest.raises(SafetensorError) as refused:
        deserialize(len(raw).to_bytes(8, "little") + raw + bytes(32))
    if "expected one of" in str(refused.value):
        listed = str(refused.value).split("expected one of")[1]
        assert {word for word in listed.split("`")[1::2]} <= set(BITS)


@pytest.mark.parametrize("which", ["model", "forget"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda d, i: (d / "model-00002-of-00002.safetensors").unlink(), FileNotFoundError, "which does not exist"),
        (
            lambda d, i: i["weight_map"].update(b="../files/model"),
            ValueError,
            "it must be a safetensors file beside it",
        ),
        (lambda d, i: i["weight_map"].update(b="model-00001-of-00002.safetensors"), ValueError, "they must agree"),
        (lambda d, i: i["weight_map"].update(x="model-00001-of-00002.safetensors"), ValueError, "and no file holds it"),
        (lambda d, i: i["weight_map"].pop("a2"), ValueError, "puts 'a2' into no file, and"),
        (lambda d, i: i.pop("weight_map"), ValueError, "must hold a weight_map"),
        (lambda d, i: i.update(weight_map={"a": 1}), ValueError, "must hold a weight_map"),
        (lambda d, i: write_file(d / "model.safetensors", {}), ValueError, "which is the model? Remove one"),
    ],
    ids=["missing", "outside", "elsewhere", "unknown", "unlisted", "no map", "no names", "both"],
)
def test_damaged_indexes(files, tmp_path, which, spoil, error, message):
    shards = [{"a": torch.ones(4, 5), "a2": torch.ones(1)}, {"b": torch.ones(3)}]
    folder = write_shards(files["model"].parent / "folder", shards)
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    spoil(folder, parsed)
    index.write_text(json.dumps(parsed))
    assert_refused(files | {which: folder}, tmp_path / "out", error, f"{which}: ")
    assert_refused(files | {which: folder}, tmp_path / "out", error, message)


def test_an_index_that_is_no_json(files, tmp_path):
    folder = write_shards(tmp_path / "files" / "folder", [{"a": torch.ones(4, 5)}])
    (folder / "model.safetensors.index.json").write_text("{")
    assert_refused(files | {"model": folder}, tmp_path / "out", ValueError, "model.safetensors.index.json' is no JSON")


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"mode": "batch", "frozen": {"a": 1}, "names": []}'])
def test_damaged_records_of_importances(files, tmp_path, record):
    write_raw(files["forget"], {"a": torch.ones(4, 5)}, __metadata__={"unlearn_fast.importance": record})
    assert_refused(files, tmp_path / "out", ValueError, "forget: the record of importances in")


def test_a_record_without_its_data(files, tmp_path):
    record = json.dumps({"mode": "batch", "frozen": {}, "names": ["a", "b"]})
    write_raw(files["forget"], {"a": torch.ones(4, 5)}, __metadata__={"unlearn_fast.importance": record})
    assert_refused(files, tmp_path / "out", ValueError, "lists 'b', and has no data for it")
