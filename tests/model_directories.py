"""Small model directories and files of rows, and the command on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn_fast.cli import main

T = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

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


ASKED = {"role": "user", "content": "a b"}
TURNS = [
    ASKED,
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]


def write_sets(folder: Path) -> list[str]:
    """The arguments of the two sets."""
    forget, retain = write(folder / "forget.jsonl", FORGET), write(folder / "retain.jsonl", RETAIN)
    return ["--forget", str(forget), "--reference", str(retain)]


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
