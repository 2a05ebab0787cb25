"""`unlearn_fast ssd`: model directories of transformers forget the rows of files."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from model_directories import (
    FORGET_BY_HAND,
    RETAIN,
    RETAIN_BY_HAND,
    SETTINGS,
    T,
    batch_by_hand,
    command,
    contents,
    save,
    write,
)

from unlearn_fast import Importance, causal_lm_losses, classification_losses, ssd_
from unlearn_fast.cli import main
from unlearn_fast.integrations import huggingface, pretrained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama, tied", "gpt2"])
def test_equals_ssd_by_hand_bit_for_bit(kind, dtype, tmp_path, files, capsys):
    model_dir, out = save(kind, tmp_path / "model", dtype), tmp_path / "out"
    by_hand = T.AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype="auto")
    before = {n: p.detach().clone() for n, p in by_hand.named_parameters()}
    expected = ssd_(
        by_hand, forget=[batch_by_hand(FORGET_BY_HAND)], reference=[batch_by_hand(RETAIN_BY_HAND)],
        losses=causal_lm_losses, progress=False, **SETTINGS,
    )  # fmt: skip
    assert 0 < expected.total.selected < expected.total.elements

    assert main(command(model_dir, files, out)) == 0
    assert capsys.readouterr().out == f"{expected}\nwritten to {out}\n"
    ours = T.AutoModelForCausalLM.from_pretrained(out, torch_dtype="auto")
    assert ours.dtype == dtype and type(ours) is type(by_hand)
    for (name, p), q in zip(by_hand.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(before[n], p) for n, p in ours.named_parameters())
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == (kind != "llama")
    ids = T.AutoTokenizer.from_pretrained(out)("a b", return_tensors="pt")["input_ids"]
    assert ours.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 3


def test_the_python_function_is_the_command(llama, tmp_path, files):
    assert main(command(llama, files, tmp_path / "a")) == 0
    report = huggingface.ssd(llama, files[1], files[3], tmp_path / "b", progress=False, **SETTINGS)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert report.total.selected > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama, classification", "bert, classification"])
def test_batch_size_and_order_do_not_matter(kind, tmp_path):
    model_dir = save(kind, tmp_path / "model")
    data = [row | {"label": i % 3} for i, row in enumerate([*RETAIN[:3], {"text": "a"}, {"text": "c d </s>"}])]
    found = {}
    for name, size, order in (("one", 1, 1), ("eight", 8, 1), ("two", 2, -1)):
        files = [write(tmp_path / f"{name}.jsonl", data[::order])] * 2
        saved = tmp_path / name
        huggingface.ssd(model_dir, *files, alpha=0, batch_size=size, save_importances=saved, progress=False)
        found[name] = Importance.load(saved / "forget.safetensors")
    assert found["one"].batches == 5 and found["eight"].batches == 1
    largest = max(float(t.max()) for t in found["one"].values())  # the gradients of the key's biases in BERT are noise
    for name, expected in found["one"].items():
        for other in ("eight", "two"):
            torch.testing.assert_close(found[other][name], expected, rtol=1e-4, atol=1e-8 * largest)


@pytest.mark.parametrize("kind", ["llama, classification", "bert, classification"])
def test_classification(kind, tmp_path, capsys):
    model_dir, out = save(kind, tmp_path / "model"), tmp_path / "out"
    data = [{"text": "a b c", "label": 0}, {"sentence": "d e", "label": 2}, {"input_ids": [7, 8], "label": 1}]
    ids = [[1, 6, 7, 8], [1, 9, 10], [7, 8]]
    files = [
        "--forget",
        str(write(tmp_path / "f.jsonl", data[:1])),
        "--reference",
        str(write(tmp_path / "r.jsonl", data)),
    ]
    by_hand = T.AutoModelForSequenceClassification.from_pretrained(model_dir)
    labelled = [(i, row["label"]) for i, row in zip(ids, data, strict=True)]
    r = [{"input_ids": torch.tensor([i]), "labels": torch.tensor([label])} for i, label in labelled]
    f = r[:1]
    expected = ssd_(by_hand, forget=f, reference=r, losses=classification_losses, progress=False, **SETTINGS)
    capsys.readouterr()
    assert main(command(model_dir, files, out, "--batch-size", "1", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"]["selected"] == expected.total.selected > 0
    ours = T.AutoModelForSequenceClassification.from_pretrained(out)
    for p, q in zip(by_hand.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert ours.config.pad_token_id == by_hand.config.pad_token_id  # measuring needs one; what is saved does not


# The directory


def test_a_complete_directory(llama, tmp_path, files):
    for name in ("README.md", "modeling_own.py", "code/more.py"):
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text(name)
    left_behind = ("pytorch_model.bin", "optimizer.pt", "train.jsonl", ".hidden", "original/consolidated.00.pth")
    for name in left_behind:
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text("the past")
    before = contents(llama)
    assert main(command(llama, files, tmp_path / "out")) == 0
    after = contents(tmp_path / "out")
    assert contents(llama) == before
    assert after.keys() == before.keys() - set(left_behind)
    assert {n for n in after if after[n] != before[n]} == {"model.safetensors"}
    assert "generation_config.json" in after and "tokenizer.json" in after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forget.jsonl", "model", "out", "retain.jsonl"]


def test_sharded_weights(tmp_path, files, monkeypatch):
    whole, sharded = save("llama", tmp_path / "whole"), save("llama", tmp_path / "sharded", max_shard_size="8KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    monkeypatch.setattr(pretrained, "SHARD", "8KB")
    assert main(command(sharded, files, tmp_path / "a")) == 0
    monkeypatch.undo()
    assert main(command(whole, files, tmp_path / "b")) == 0
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    a, b = (T.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_another_dtype_is_told_in_the_config(tmp_path, files):
    model_dir = save("llama", tmp_path / "model", torch.bfloat16)
    assert main(command(model_dir, files, tmp_path / "out", "--dtype", "float32")) == 0
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto")
    assert loaded.dtype == torch.float32


def test_generation_settings_that_cannot_be_saved_are_copied(llama, tmp_path, files):
    path = llama / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.5, "eos_token_id": 2}))
    assert main(command(llama, files, tmp_path / "out")) == 0
    assert (tmp_path / "out" / path.name).read_text() == path.read_text()


def test_a_dry_run_writes_nothing(llama, tmp_path, files, capsys):
    before = contents(tmp_path)
    assert main(command(llama, files, tmp_path / "out", "--dry-run")) == 0
    assert main(command(llama, files, None, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert out.count("dampened") == 2 and out.count("nothing is written: a dry run") == 2
    assert contents(tmp_path) == before


def test_importances_are_saved_and_used_again(llama, tmp_path, files, capsys):
    saved = tmp_path / "importances"
    assert main(command(llama, files, tmp_path / "a", "--save-importances", str(saved))) == 0
    assert sorted(p.name for p in saved.iterdir()) == ["forget.safetensors", "reference.safetensors"]
    again = [word if word.startswith("-") else str(saved / f"{name}.safetensors") for word, name in zip(
        files, ["", "forget", "", "reference"], strict=True)]  # fmt: skip
    capsys.readouterr()
    for given, name in ((again, "b"), (again[:2] + files[2:], "c")):
        assert main(command(llama, given, tmp_path / name)) == 0
        assert (tmp_path / name / "model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    assert "other weights" not in capsys.readouterr().err
    assert main(command(tmp_path / "a", again, None, "--dry-run")) == 0
    assert "were measured on other weights than the model's" in capsys.readouterr().err

    assert main(command(llama, files, None, "--dry-run", "--save-importances", str(saved))) == 2
    assert "exists: remove it, or give it instead of the rows" in capsys.readouterr().err
    assert main(command(llama, again, None, "--dry-run", "--save-importances", str(saved))) == 2
    assert "nothing is measured" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["killed", "stopped", "fails"])
def test_nothing_appears_before_it_is_complete(how, llama, tmp_path, files):
    """Between the writing of the weights and the name."""
    code = f"""
import sys, time
from unlearn_fast.cli import main
from unlearn_fast.integrations import pretrained
def slow(*_):
    if {how!r} == "fails":
        raise OSError("the disk is full")
    print("now", flush=True)
    time.sleep(60)
pretrained.copy_other_files = slow
sys.exit(main({command(llama, files, tmp_path / "out")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if how != "fails":
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / "out").exists()
    if how != "killed":
        assert not list(tmp_path.glob(".*"))
    if how == "fails":
        assert process.returncode == 2 and "the disk is full" in err and "Traceback" not in err


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_its_own_runs_on_request_and_is_copied(llama, tmp_path, files):
    (llama / "own.py").write_text(OWN_CODE)
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (llama / "config.json").write_text(json.dumps(config))
    words, environment = command(llama, files, tmp_path / "out"), os.environ | {"HF_MODULES_CACHE": str(tmp_path / "c")}
    run = [sys.executable, "-m", "unlearn_fast", *words]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr and "Traceback" not in done.stderr
    run.append("--trust-remote-code")
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    after = contents(tmp_path / "out")
    assert after["own.py"] == OWN_CODE.encode() and json.loads(after["config.json"]) == config
