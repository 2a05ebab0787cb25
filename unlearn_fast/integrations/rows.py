"""Rows of data files as tokens and targets: what is supervised, and what is wrong with a row."""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_fast._optional import require

IGNORED = -100
DATA_FILES = (".jsonl", ".parquet")
CAUSAL_FIELDS = "'text', 'prompt' and 'completion', 'question' and 'answer', 'messages', or 'input_ids'"
CLASSIFICATION_FIELDS = "'label' and one of 'text', 'sentence' and 'input_ids'"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # where a chat template tells the assistant's tokens


class Example(NamedTuple):
    """int32 until they become a batch: a reference set may be large."""

    ids: Tensor  # [T]
    target: Tensor  # labels [T], or the class, []
    cut: bool = False


Encode = Callable[[Mapping[str, Any]], Example]


def read_examples(path: Path, encode: Encode) -> list[Example]:
    """Every row of a .jsonl or .parquet file; ValueError names the file and the line of what is wrong."""
    examples: list[Example] = []
    rows, unit = (_parquet(path), "row") if path.suffix == ".parquet" else (path.open("rb"), "line")
    for number, row in enumerate(rows, 1):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            examples.append(encode(_fields(row)))
        except ValueError as error:
            raise ValueError(f"{path}, {unit} {number}: {error}") from error
    if not examples:
        raise ValueError(f"{path} holds no rows: it must hold at least one")
    if cut := sum(example.cut for example in examples):
        warnings.warn(f"{path}: {cut} of {len(examples)} rows are longer than max_length and were cut", stacklevel=2)
    return examples


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    require("pyarrow", "hf", f"reading {path}")
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no parquet file: {error}") from error


def _fields(row: Any) -> Mapping[str, Any]:
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(row, Mapping):
        raise ValueError(f"it is a {type(row).__name__}: it must be a JSON object")
    return {name: value for name, value in row.items() if value is not None}  # parquet has every field in every row


class CausalRows:
    """Rows for causal language models, as `huggingface.ssd` tells. Where a row could be read in several ways, tokens
    come first, then messages, pairs, and text."""

    def __init__(self, tokenizer: Any, max_length: int, vocabulary: int) -> None:
        self.tokenizer, self.max_length, self.vocabulary = tokenizer, max_length, vocabulary

    def __call__(self, row: Mapping[str, Any]) -> Example:
        ids, labels = self._tokens(row)
        check_ids(ids, self.vocabulary)
        kept, target = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in target[1:]):
            if any(label != IGNORED for label in labels[1:]):
                raise ValueError(f"none of the first {self.max_length} tokens is supervised: max_length must be larger")
            raise ValueError("no token is supervised: there must be one, after the first token, which nothing predicts")
        return Example(_int32(kept), _int32(target), len(ids) > self.max_length)

    def _tokens(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        if "input_ids" in row:
            ids = integers(row, "input_ids")
            check_ids(ids, self.vocabulary)
            labels = integers(row, "labels") if "labels" in row else ids
            if len(ids) != len(labels):
                raise ValueError(f"'input_ids' has {len(ids)} entries and 'labels' {len(labels)}: they must be as many")
            if bad := [label for label in labels if label != IGNORED and not 0 <= label < self.vocabulary]:
                raise ValueError(
                    f"'labels' has {bad[0]}: labels must be {IGNORED} or below {self.vocabulary}, the vocabulary"
                )
            return ids, labels
        if "messages" in row:
            return self._chat(row["messages"])
        for first, second, between in (("prompt", "completion", ""), ("question", "answer", " ")):
            if first in row and second in row:
                prompt, completion = string(row, first), string(row, second)
                if not completion:
                    raise ValueError(f"{second!r} is empty: it is what is supervised")
                return self._completion(prompt + between, completion)
        if "text" in row:
            ids = token_ids(self.tokenizer, string(row, "text"))
            return ids, ids
        raise ValueError(f"it has the fields {list(row)}: it must have {CAUSAL_FIELDS}")

    def _completion(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Tokens of the whole text, as the model was trained on it: where a token spans the border, it counts as
        completion."""
        ids, end = token_ids(self.tokenizer, prompt + completion), self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        return ids, _after(_common(ids, token_ids(self.tokenizer, prompt)), ids)

    def _chat(self, messages: Any) -> tuple[list[int], list[int]]:
        if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise ValueError("'messages' must be a list of objects with 'role' and 'content'")
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise ValueError("'messages' has no message of the role 'assistant', which is what is supervised")
        tokenizer = needed(self.tokenizer)
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: write 'prompt' and 'completion' instead of 'messages'"
            )
        try:
            if GENERATION.search(tokenizer.get_chat_template()) and tokenizer.is_fast:
                made = _templated(tokenizer, messages, return_assistant_tokens_mask=True)
                pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
                return list(made["input_ids"]), [token if mask else IGNORED for token, mask in pairs]
            ids = list(_templated(tokenizer, messages[: last + 1])["input_ids"])
            prompt = _templated(tokenizer, messages[:last], add_generation_prompt=True)["input_ids"] if last else []
        except Exception as error:  # a template is a program of its own, and refuses in its own ways
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return ids, _after(_common(ids, prompt), ids)


class ClassificationRows:
    """Rows for sequence classification: `label`, and `input_ids`, `text` or `sentence`."""

    def __init__(self, tokenizer: Any, max_length: int, vocabulary: int, classes: int) -> None:
        self.tokenizer, self.max_length, self.vocabulary, self.classes = tokenizer, max_length, vocabulary, classes

    def __call__(self, row: Mapping[str, Any]) -> Example:
        field = next((name for name in ("input_ids", "text", "sentence") if name in row), None)
        if field is None or "label" not in row:
            raise ValueError(f"it has the fields {list(row)}: it must have {CLASSIFICATION_FIELDS}")
        label = row["label"]
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < self.classes:
            raise ValueError(f"'label' is {label!r}: it must be an integer from 0 to {self.classes - 1}")
        ids = integers(row, field) if field == "input_ids" else token_ids(self.tokenizer, string(row, field))
        if not ids:
            raise ValueError(f"{field!r} holds no token: it must hold at least one")
        check_ids(ids, self.vocabulary)
        cut = len(ids) > self.max_length
        if cut and field != "input_ids":  # the tokenizer keeps the tokens that it puts at the end
            ids = token_ids(self.tokenizer, row[field], truncation=True, max_length=self.max_length)
        return Example(_int32(ids[: self.max_length]), _int32(label), cut)


def string(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name!r} is a {type(row[name]).__name__}: it must be a string")
    return row[name]


def integers(row: Mapping[str, Any], name: str) -> list[int]:
    value = row[name]
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"{name!r} must be a list of integers")
    return value


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(f"it has the tokens {min(ids)} to {max(ids)}: the model's are 0 to {vocabulary - 1}")


def needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("the model directory has no tokenizer: rows must hold 'input_ids'")
    return tokenizer


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    # verbose=False: what is too long is cut later, and told then
    return list(needed(tokenizer)(text, verbose=False, **options)["input_ids"])


def _templated(tokenizer: Any, messages: Sequence[Any], **options: Any) -> Any:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _after(start: int, ids: list[int]) -> list[int]:
    return [IGNORED] * start + ids[start:]


def _int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
