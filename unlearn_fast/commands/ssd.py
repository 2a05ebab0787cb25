"""`unlearn_fast ssd`: a model directory of transformers forgets."""

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unlearn_fast.commands import UsageError, as_text
from unlearn_fast.commands.settings import add_settings, as_json, settings


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `unlearn_fast`."""
    parser = commands.add_parser(
        "ssd",
        help="a Hugging Face model directory forgets the rows of a file, without training",
        description="Selective Synaptic Dampening of a local model directory: measures the importances of both sets,"
        " dampens, and writes a new directory. Rows are {text}, {prompt, completion}, {question, answer}, {messages} or"
        " {input_ids, labels}; for classification {text, label} or {sentence, label}. Nothing is downloaded.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model directory, which is only read")
    rows = ".jsonl or .parquet, or importances (.safetensors)"
    parser.add_argument("--forget", type=Path, required=True, metavar="FILE", help=f"what to forget: {rows}")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help=f"what to keep, or all: {rows}")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="the new model directory")
    add_settings(parser)
    parser.add_argument(
        "--task", choices=("causal-lm", "classification"), help="by default as the architecture in config.json says"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="for speed and memory (default: 8)")
    parser.add_argument(
        "--max-length", type=int, metavar="T", help="tokens of a row (default: the model's limit, at most 1024)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="in which the model is measured and saved (default: auto, as it is stored)",
    )
    parser.add_argument(
        "--save-importances", type=Path, metavar="DIR", help="keep forget.safetensors and reference.safetensors there"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that lies in MODEL")
    parser.add_argument("--dry-run", action="store_true", help="only report: no model is written, and OUT not needed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from unlearn_fast.integrations import huggingface

    if arguments.out is None and not arguments.dry_run:
        raise UsageError("ssd: -o is missing: it names the new model directory; --dry-run goes without")
    out = None if arguments.dry_run else arguments.out
    names = ("task", "batch_size", "max_length", "device", "dtype", "save_importances", "trust_remote_code")
    options = settings(arguments) | {name: getattr(arguments, name) for name in names}
    with _told() as told:
        try:
            report = huggingface.ssd(arguments.model, arguments.forget, arguments.reference, out, **options)
        except torch.OutOfMemoryError as error:
            raise UsageError("ssd: the GPU's memory is full: try a smaller --batch-size or --max-length") from error
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise UsageError(f"ssd: {_one_line(error)}") from error
    if arguments.json:
        record = {"out": None if out is None else str(out), **as_json(report), "settings": settings(arguments)}
        print(as_text(record | {"warnings": told}))
    else:
        print(report)
        print("nothing is written: a dry run" if out is None else f"written to {out}")
    return 0


@contextmanager
def _told() -> Iterator[list[str]]:
    """Warnings as lines without the place in the code; returns what was told."""
    told: list[str] = []

    def tell(message: Any, *_: Any, **__: Any) -> None:
        told.append(_one_line(message))
        print(f"unlearn_fast: ssd: {told[-1]}", file=sys.stderr)

    with warnings.catch_warnings():  # which also puts showwarning back
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = tell
        yield told


def _one_line(message: Any) -> str:
    return " ".join(str(message).split())
