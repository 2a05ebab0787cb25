"""What `unlearn_fast ssd` refuses: one line, and nothing is written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_directories import (
    FORGET_BY_HAND,
    TURNS,
    T,
    batch_by_hand,
    build,
    command,
    make_tokenizer,
    refused,
    save,
    write,
)

from unlearn_fast import causal_lm_losses, diagonal_fisher
from unlearn_fast.cli import main
from unlearn_fast.integrations import huggingface


def test_importances_of_another_model_or_mode(llama, tmp_path, files, capsys):
    other, path = build("gpt2"), tmp_path / "forget.safetensors"
    given = ["--forget", str(path), *files[2:]]
    diagonal_fisher(other, [batch_by_hand(FORGET_BY_HAND)], causal_lm_losses, progress=False).save(path)
    refused(command(llama, given, tmp_path / "out"), "holds importances of another model", capsys)
    same = T.AutoModelForCausalLM.from_pretrained(llama)
    diagonal_fisher(same, [batch_by_hand(FORGET_BY_HAND)], causal_lm_losses, mode="batch", progress=False).save(path)
    refused(command(llama, given, tmp_path / "out"), "of mode 'batch': they must be of mode 'per_example'", capsys)
    assert main(command(llama, [*given[:2], "--reference", str(path)], None, "--dry-run")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--alpha", "-1"], "alpha is -1.0: it must be >= 0"),
        (["--exponent", "0"], "exponent is 0.0: it must be > 0"),
        (["--batch-size", "0"], "batch_size is 0: it must be at least 1"),
        (["--max-length", "1"], "max_length is 1: it must be at least 2"),
        (["--max-length", "33"], "max_length is 33: the model has 32 positions"),
        (["--save-importances", "/no/such/place"], "save_importances: the directory '/no/such' does not exist"),
    ],
)
def test_wrong_settings(more, message, llama, tmp_path, files, capsys):
    refused(command(llama, files, tmp_path / "out", *more), message, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(llama, tmp_path, files, capsys):
    refused(command(llama, files, tmp_path / "out", "--device", "cuda"), "sees no GPU here", capsys)


def test_wrong_outs(llama, tmp_path, files, capsys):
    refused(command(llama, files, None), "-o is missing", capsys)
    (tmp_path / "there").mkdir()
    refused(command(llama, files, tmp_path / "there"), "exists: it must be a new directory", capsys)
    refused(command(llama, files, llama / "out"), "lies inside the model directory", capsys)
    refused(command(llama, files, tmp_path / "no" / "out"), "does not exist", capsys)
    for folder, name in ((tmp_path / "out", "out"), (tmp_path / "out/in", "out"), (llama / "in", "model_dir")):
        more = ["--save-importances", str(folder)]
        message = f"save_importances is {str(folder)!r}: it must be a directory outside of {name}"
        refused(command(llama, files, tmp_path / "out", *more), message, capsys)
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid():
        refused(command(llama, files, tmp_path / "closed" / "out"), "nothing can be written", capsys)


def test_a_full_disk(llama, tmp_path, files, capsys, monkeypatch):
    monkeypatch.setattr(huggingface.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    refused(command(llama, files, tmp_path / "out"), "GB left", capsys)


def test_wrong_models(llama, tmp_path, files, capsys):
    def config(**changes: Any) -> None:
        (llama / "config.json").write_text(json.dumps(original | changes))

    out, original = tmp_path / "out", json.loads((llama / "config.json").read_text())
    refused(command(tmp_path / "none", files, out), "is no directory: it must be a local one", capsys)
    (tmp_path / "empty").mkdir()
    refused(command(tmp_path / "empty", files, out), "it has no config.json", capsys)
    config(architectures=["LlamaModel"])
    refused(command(llama, files, out), "names the architecture LlamaModel: it must be a causal language", capsys)
    config(architectures=None)
    refused(command(llama, files, out), "of no model", capsys)
    config(quantization_config={"quant_method": "gptq", "bits": 4})
    refused(command(llama, files, out), "is quantized", capsys)
    config(model_type="unheard_of")
    refused(command(llama, files, out), "unheard_of", capsys)
    config()
    (llama / "adapter_config.json").write_text("{}")
    refused(command(llama, files, out), "holds an adapter: merge it into its model first", capsys)
    (llama / "adapter_config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    refused(command(llama, files, out), "the model directory has no tokenizer: rows must hold 'input_ids'", capsys)
    (llama / "model.safetensors").unlink()
    write(Path(files[1]), [{"input_ids": [1, 2]}])
    write(Path(files[3]), [{"input_ids": [1, 2]}])
    refused(command(llama, files, out), "no file named", capsys)


@pytest.mark.parametrize("changes", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_classifications_of_other_kinds(changes, tmp_path, files, capsys):
    model_dir = save("bert, classification", tmp_path / "model")
    config = T.AutoConfig.from_pretrained(model_dir)
    config.update(changes)
    config.save_pretrained(model_dir)
    refused(command(model_dir, files, tmp_path / "out"), "classifies by no single label of several", capsys)


def test_damaged_models(llama, tmp_path, files, capsys):
    config = (llama / "config.json").read_bytes()
    for name, damaged, message in (
        ("model.safetensors", b"\xff" * 20, "cannot be loaded"),
        ("tokenizer.json", b"{", "cannot be loaded"),
        ("config.json", b"{", "config.json is no JSON"),
        ("config.json", config.replace(b'"vocab_size": 26', b'"vocab_size": 27'), "cannot be loaded"),
    ):
        right = (llama / name).read_bytes()
        (llama / name).write_bytes(damaged)
        refused(command(llama, files, tmp_path / "out"), message, capsys)
        (llama / name).write_bytes(right)


def test_a_chat_template_that_refuses(llama, tmp_path, files, capsys):
    make_tokenizer("{{ raise_exception('roles must alternate') }}").save_pretrained(llama)
    write(Path(files[1]), [{"messages": TURNS}])
    message = f"{files[1]}, line 1: the chat template refuses these messages: roles must alternate"
    refused(command(llama, files, tmp_path / "out"), message, capsys)


def test_a_task_that_the_model_was_not_trained_for(llama, tmp_path, files, capsys):
    labelled = write(tmp_path / "labelled.jsonl", [{"text": "a b", "label": 1}])
    given = ["--forget", str(labelled), "--reference", str(labelled), "--task", "classification"]
    message = "has no weights for 'score.weight' (of 1 such parameters) of LlamaForSequenceClassification"
    refused(command(llama, given, tmp_path / "out"), message, capsys)


def test_weights_that_are_not_used_are_told(tmp_path, files, capsys):
    model_dir = save("llama, tied", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(model_dir / "model.safetensors")
    save_file(weights | {"extra.weight": torch.ones(2)}, model_dir / "model.safetensors", {"format": "pt"})
    assert main(command(model_dir, files, None, "--dry-run")) == 0
    assert "has 'extra.weight' (of 1 such weights)" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "file"), [("transformers", "forget.jsonl"), ("pyarrow", "forget.parquet")])
def test_missing_optional_package(package, file, llama, tmp_path, files, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    (tmp_path / file).touch()
    message = f"needs {package}, which is not installed: pip install 'unlearn_fast[hf]'"
    refused(command(llama, ["--forget", str(tmp_path / file), *files[2:]], tmp_path / "out"), message, capsys)


def test_importing_the_command_line_loads_no_optional_package():
    code = "import sys, unlearn_fast.cli; unlearn_fast.cli._parser(); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
