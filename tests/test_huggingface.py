"""`unlearn_fast ssd`: model directories of transformers forget the rows of files."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn_fast import Importance, causal_lm_losses, classification_losses, diagonal_fisher, ssd_
from unlearn_fast.cli import main
from unlearn_fast.integrations import huggingface, pretrained, rows
from unlearn_fast.integrations.batches import Batches

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
T = transformers

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *"abcdefghijklmnopqrst"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHAT = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
MARKED_CHAT = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} {{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
FORGET = [{"text": "a b c d e"}, {"prompt": "a b c", "completion": " f g"}, {"question": "h i", "answer": "j"}]
RETAIN = [{"text": "k l m n o p q r"}, {"text": "k l"}, {"text": "b q r s t"}, {"prompt": "s", "completion": " t t"}]
SETTINGS = {"alpha": 2.0, "lam": 0.5}


def make_tokenizer(chat: str | None = None, begin: bool = True) -> Any:
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if begin:
        core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return T.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat, **names)


def build(kind: str) -> Any:
    torch.manual_seed(0)
    llama = {"vocab_size": len(WORDS), "max_position_embeddings": 32, **SIZES, **SPECIAL}
    if kind == "gpt2":
        sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=len(WORDS), **sizes, **SPECIAL))
    if kind == "llama, classification":
        return T.LlamaForSequenceClassification(T.LlamaConfig(num_labels=3, **llama | {"pad_token_id": None}))
    if kind == "bert, classification":
        return T.BertForSequenceClassification(T.BertConfig(num_labels=3, **llama))
    return T.LlamaForCausalLM(T.LlamaConfig(tie_word_embeddings=kind == "llama, tied", **llama))


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    build(kind).to(dtype).save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def write(path: Path, data: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The arguments of the two sets."""
    forget, retain = write(tmp_path / "forget.jsonl", FORGET), write(tmp_path / "retain.jsonl", RETAIN)
    return ["--forget", str(forget), "--reference", str(retain)]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "model")


def command(model: Path, files: list[str], out: Path | None, *more: str) -> list[str]:
    words = ["ssd", str(model), *files, "--alpha", "2", "--lam", "0.5", *more]
    return words if out is None else [*words, "-o", str(out)]


def batch_by_hand(texts: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    """Words, and how many of them are not supervised; the longest first, as the command orders them."""
    found = sorted(([WORDS.index(w) for w in text.split()], skipped) for text, skipped in texts)
    found.sort(key=lambda pair: -len(pair[0]))
    ids = torch.zeros(len(found), len(found[0][0]), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, skipped) in enumerate(found):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, skipped : len(row)] = torch.tensor(row[skipped:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


FORGET_BY_HAND = [("<s> a b c d e", 0), ("<s> a b c f g </s>", 4), ("<s> h i j </s>", 3)]
RETAIN_BY_HAND = [("<s> k l m n o p q r", 0), ("<s> k l", 0), ("<s> b q r s t", 0), ("<s> s t t </s>", 2)]


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


# Rows


def encoded(row: dict[str, Any], chat: str | None = None, **options: Any) -> tuple[str, str]:
    """The tokens, and those of them that are supervised, as words."""
    encode = rows.CausalRows(make_tokenizer(chat), options.get("max_length", 32), len(WORDS))
    ids, labels, _ = encode(row)
    assert all(t in (-100, i) for i, t in zip(ids, labels, strict=True))
    return " ".join(WORDS[i] for i in ids), " ".join(WORDS[i] for i in labels if i != -100)


ASKED = {"role": "user", "content": "a b"}
TURNS = [
    ASKED,
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]


@pytest.mark.parametrize(
    ("row", "chat", "supervised"),
    [
        ({"text": "a b"}, None, "<s> a b"),
        ({"prompt": "a b", "completion": " c d"}, None, "c d </s>"),
        ({"prompt": "a b", "completion": "c d"}, None, "<unk> d </s>"),  # one token that spans the border
        ({"question": "a b", "answer": "c"}, None, "c </s>"),
        ({"question": "a b", "answer": "c </s>"}, None, "c </s>"),
        ({"prompt": "", "completion": "c"}, None, "c </s>"),
        ({"messages": TURNS}, CHAT, "e f </s>"),
        ({"messages": TURNS}, MARKED_CHAT, "c </s> e f </s>"),
        ({"messages": [*TURNS, ASKED]}, CHAT, "e f </s>"),
        ({"messages": TURNS[1:2]}, CHAT, "<s> assistant c </s>"),
        ({"input_ids": [6, 7, 8]}, None, "a b c"),
        ({"input_ids": [6, 7, 8], "labels": [-100, -100, 8]}, None, "c"),
        ({"text": "a", "question": "b", "answer": "c", "note": None}, None, "c </s>"),
    ],
)  # fmt: skip
def test_what_is_supervised(row, chat, supervised):
    assert encoded(row, chat)[1] == supervised


def test_the_chat_template_is_followed():
    assert encoded({"messages": TURNS}, CHAT)[0] == "<s> user a b </s> assistant c </s> user d </s> assistant e f </s>"


def test_batches_hold_every_row_once_the_longest_first():
    encode = rows.CausalRows(make_tokenizer(), 32, len(WORDS))
    batches = Batches([encode({"text": text}) for text in ("a", "b c d", "e f", "g h i j")], 3, pad=0)
    first, second = batches
    assert len(batches) == 2
    assert first["input_ids"].tolist() == [[1, 12, 13, 14, 15], [1, 7, 8, 9, 0], [1, 10, 11, 0, 0]]
    assert first["labels"][2].tolist() == [1, 10, 11, -100, -100] and first["attention_mask"][2].sum() == 3
    assert second["input_ids"].tolist() == [[1, 6]]


def test_long_rows_are_cut_and_told(llama, tmp_path, files, capsys):
    assert main(command(llama, files, None, "--dry-run", "--max-length", "7", "--json")) == 0
    captured = capsys.readouterr()
    told = f"{files[3]}: 1 of 4 rows were cut, max_length is shorter than they"
    assert json.loads(captured.out)["warnings"] == [told] and told in captured.err


def test_classification_keeps_the_end_of_what_it_cuts():
    tokenizer = make_tokenizer()
    ends = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    ids, label, cut = rows.ClassificationRows(tokenizer, 4, len(WORDS), 3)({"text": "a b c d", "label": 2})
    assert (ids.tolist(), int(label), cut) == ([1, 6, 7, 2], 2, True)


def test_parquet(llama, tmp_path, files):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pa = pytest.importorskip("pyarrow")
    mixed = tmp_path / "forget.parquet"
    fields = dict.fromkeys(field for row in FORGET for field in row)  # every row has every field, most of them empty
    parquet.write_table(pa.Table.from_pylist([fields | row for row in FORGET]), mixed)
    assert main(command(llama, files, tmp_path / "a")) == 0
    assert main(command(llama, ["--forget", str(mixed), *files[2:]], tmp_path / "b")) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


# What is wrong


BAD_ROWS: list[tuple[Any, str]] = [
    ({"txt": "a"}, "it has the fields ['txt']: it must have 'text', 'prompt' and 'completion'"),
    ({"prompt": "a"}, "it has the fields ['prompt']: it must have"),
    ({"text": 3}, "'text' is a int: it must be a string"),
    ({"prompt": "a", "completion": ""}, "'completion' is empty: it is what is supervised"),
    ({"text": ""}, "no token is supervised: there must be one, after the first token"),
    ({"messages": "a"}, "'messages' must be a list of objects with 'role' and 'content'"),
    ({"messages": [ASKED]}, "'messages' has no message of the role 'assistant'"),
    ({"messages": TURNS}, "the tokenizer has no chat template: write 'prompt' and 'completion'"),
    ({"input_ids": "a"}, "'input_ids' must be a list of integers"),
    ({"input_ids": [1, 99]}, "it has the tokens 1 to 99: the model's are 0 to 25"),
    ({"input_ids": [1, 2], "labels": [1]}, "'input_ids' has 2 entries and 'labels' 1: they must be as many"),
    ({"input_ids": [1, 2], "labels": [1, 26]}, "'labels' has 26: labels must be -100 or below 26"),
    ({"input_ids": [1, 2], "labels": [1, -100]}, "no token is supervised"),
    ({"prompt": "a " * 40, "completion": "b"}, "none of the first 32 tokens is supervised: max_length must be larger"),
    ([1], "it is a list: it must be a JSON object"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message[:30] for _, message in BAD_ROWS])
def test_a_wrong_row_is_named_by_file_and_line(row, message, llama, tmp_path, files, capsys):
    write(tmp_path / "forget.jsonl", [{"text": "a b"}, row])
    refused(command(llama, files, tmp_path / "out"), f"{files[1]}, line 2: {message}", capsys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "it has the fields ['text']: it must have 'label' and one of 'text', 'sentence'"),
        ({"label": 1}, "it must have 'label' and one of"),
        ({"text": "a", "label": 3}, "'label' is 3: it must be an integer from 0 to 2"),
        ({"text": "a", "label": True}, "'label' is True: it must be"),
        ({"input_ids": [], "label": 1}, "'input_ids' holds no token"),
    ],
)
def test_a_wrong_row_of_a_classification(row, message, tmp_path, files, capsys):
    model_dir = save("llama, classification", tmp_path / "model")
    write(tmp_path / "forget.jsonl", [row])
    refused(command(model_dir, files, tmp_path / "out"), f"{files[1]}, line 1: ", capsys, message)


def test_wrong_files(llama, tmp_path, files, capsys):
    forget, out = tmp_path / "forget.jsonl", tmp_path / "out"
    forget.write_bytes(b'{"text": "a"}\n\n{"text": \xff}\n')
    refused(command(llama, files, out), "line 3: it is no JSON", capsys)
    forget.write_text("\n")
    refused(command(llama, files, out), "holds no rows: it must hold at least one", capsys)
    forget.unlink()
    refused(command(llama, files, out), "there is no such file", capsys)
    for name, text, message in (
        ("rows.csv", "", "it must be a file that ends in one of .jsonl, .parquet, .safetensors"),
        ("bad.safetensors", "nothing", "is no safetensors file"),
    ):
        (tmp_path / name).write_text(text)
        refused(command(llama, ["--forget", str(tmp_path / name), *files[2:]], out), message, capsys)
    weights = ["--forget", str(llama / "model.safetensors"), *files[2:]]
    refused(command(llama, weights, out), "it must be a file that Importance.save wrote", capsys)


def test_importances_of_another_model_or_mode(llama, tmp_path, files, capsys):
    other, path = build("gpt2"), tmp_path / "forget.safetensors"
    given = ["--forget", str(path), *files[2:]]
    diagonal_fisher(other, [batch_by_hand(FORGET_BY_HAND)], causal_lm_losses, progress=False).save(path)
    refused(command(llama, given, tmp_path / "out"), "holds importances of another model", capsys)
    same = T.AutoModelForCausalLM.from_pretrained(llama)
    diagonal_fisher(same, [batch_by_hand(FORGET_BY_HAND)], causal_lm_losses, mode="batch", progress=False).save(path)
    refused(command(llama, given, tmp_path / "out"), "of mode 'batch': they must be of mode 'per_example'", capsys)


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


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], more: str = "") -> None:
    """One line of what is wrong, and nothing written."""
    capsys.readouterr()
    out = Path(arguments[-1]) if "-o" in arguments else None
    there = out is not None and out.exists()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("unlearn_fast: ssd: ") and message in line and more in line
    assert captured.out == ""
    assert out is None or out.exists() == there


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
