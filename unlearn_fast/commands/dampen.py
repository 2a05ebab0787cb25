"""`unlearn_fast dampen`: a checkpoint on disk is dampened, whatever its size."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from unlearn_fast.commands import UsageError, as_text
from unlearn_fast.commands.settings import add_settings, as_json, settings


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `unlearn_fast`."""
    parser = commands.add_parser(
        "dampen",
        help="dampen a checkpoint on disk, of any size, in bounded memory",
        description="Selective synaptic dampening of a safetensors file, or of a directory with its index:"
        " p *= min((lam * r / f)^exponent, cap) where f > alpha * r. Every byte of anything else is kept. A run that"
        " was stopped goes on where it was when the same command is given again.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="safetensors file, or directory of a checkpoint")
    for name, symbol in (("forget", "f"), ("reference", "r")):
        text = f"importances {symbol}: what Importance.save wrote, or a file or directory with the model's names"
        parser.add_argument(f"--{name}", type=Path, required=True, metavar=name[0].upper(), help=text)
    add_settings(parser)
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="what is written; it must not exist")
    parser.add_argument("--memory", default="512MiB", metavar="SIZE", help="most memory it may use (default: 512MiB)")
    parser.add_argument("--dry-run", action="store_true", help="only report what would be selected; write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON, with the counts of each parameter")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from unlearn_fast import checkpoint

    if arguments.out is None and not arguments.dry_run:
        raise UsageError("dampen: -o is missing: it must name what is written, unless --dry-run is given")
    try:
        report = checkpoint.dampen(
            arguments.model,
            arguments.forget,
            arguments.reference,
            arguments.out,
            **settings(arguments),
            memory=_bytes("--memory", arguments.memory),
            dry_run=arguments.dry_run,
        )
    except OSError as error:  # one of ours has a text of its own, and no file name
        raise UsageError(f"dampen: {error if error.filename else error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"dampen: {error}") from error
    except KeyboardInterrupt:
        print("unlearn_fast: dampen was stopped: the same command goes on from here", file=sys.stderr)
        return 130
    if arguments.json:
        print(as_text(as_json(report) | {"files_left_out": report.files_left_out}))
    else:
        print(report)
    return 0


def _bytes(option: str, text: str) -> int:
    """`512MiB`, `1.5 GB`, `1000000`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(i?)B)?", text.strip())
    if found is None:
        raise ValueError(f"{option} is {text!r}: it must be a number of bytes, or one of KiB, MiB, GiB, MB, GB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix) if prefix else 0))
