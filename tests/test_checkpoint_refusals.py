"""Dampening on disk: what is refused. The error tells what and why, inputs stay as they are, and nothing is written."""

import json
import shutil

import pytest
import torch
from checkpoint_files import contents, run, trio, write_file, write_raw, write_shards

from unlearn_fast.checkpoint.safetensors_file import BITS


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
