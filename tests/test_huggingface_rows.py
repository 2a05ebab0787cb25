"""What is read from the files of `unlearn_fast ssd`, and what is wrong with them."""

import json
from typing import Any

import pytest
import torch
from model_directories import (
    ASKED,
    CHAT,
    FORGET,
    MARKED_CHAT,
    TURNS,
    WORDS,
    T,
    command,
    make_tokenizer,
    refused,
    save,
    tokenizers,
    write,
)

from unlearn_fast.cli import main
from unlearn_fast.integrations import rows
from unlearn_fast.integrations.batches import Batches


def encoded(row: dict[str, Any], chat: str | None = None, **options: Any) -> tuple[str, str]:
    """The tokens, and those of them that are supervised, as words."""
    encode = rows.CausalRows(make_tokenizer(chat), options.get("max_length", 32), len(WORDS))
    ids, labels, _ = encode(row)
    assert all(t in (-100, i) for i, t in zip(ids, labels, strict=True))
    return " ".join(WORDS[i] for i in ids), " ".join(WORDS[i] for i in labels if i != -100)


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


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace"])
def test_the_completion_is_supervised_whatever_the_tokenizer_merges(kind):
    """All of it, and of the prompt no more than the token that spans the border."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer, core.decoder = getattr(tokenizers.pre_tokenizers, kind)(), getattr(tokenizers.decoders, kind)()
    pairs = [("Who wrote Emma? ", "Jane Austen"), ("Who wrote", " Emma?"), ("It is nineteen", "th"), ("a: ", " b")]
    corpus = [prompt + completion for prompt, completion in pairs] * 3
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    core.train_from_iterator(corpus, trainer)
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    encode = rows.CausalRows(tokenizer, 64, len(tokenizer))
    for prompt, completion in pairs:
        ids, labels, _ = encode({"prompt": prompt, "completion": completion})
        assert tokenizer.decode(ids[:-1]).strip() == prompt + completion and tokenizer.decode(ids[-1:]) == "</s>"
        supervised = [i for i in labels.tolist() if i != rows.IGNORED]
        whole, after_border = (tokenizer.decode(ids[-n:-1]) for n in (len(supervised), len(supervised) - 1))
        assert whole.endswith(completion.strip()) and len(after_border) <= len(completion)


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


def test_few_lengths_occur_and_none_beyond_the_longest_row():
    examples = [rows.Example(torch.ones(n, dtype=torch.int32), torch.tensor(0)) for n in range(1, 101)]
    lengths = [batch["input_ids"].shape[1] for batch in Batches(examples, 1, pad=0)]
    assert all(n <= length <= 1.25 * n for n, length in zip(range(100, 0, -1), lengths, strict=True))
    assert sorted(set(lengths)) == [*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8), 80, 96, 100]


def test_long_rows_are_cut_and_told(llama, tmp_path, files, capsys):
    assert main(command(llama, files, None, "--dry-run", "--max-length", "7", "--json")) == 0
    captured = capsys.readouterr()
    told = f"{files[3]}: 1 of 4 rows are longer than max_length and were cut"
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
