"""The command line: `unlearn_fast info | verify | bench | demo | ssd | dampen`."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import unlearn_fast
from unlearn_fast._optional import require
from unlearn_fast.commands import UsageError, as_text, dampen, ssd

STDOUT = "-"
DEVICES = ("cpu", "cuda")

# What a command needs beyond the package's own dependencies: module -> the extra that installs it.
DEMO_NEEDS = {"sklearn": "demo", "transformers": "demo", "matplotlib": "demo"}
PLOT_NEEDS = {"matplotlib": "bench"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0; 1 where a check failed; 2 for wrong usage or a missing optional package."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UsageError as error:
        print(f"unlearn_fast: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unlearn_fast", description=unlearn_fast.__doc__)
    parser.add_argument("--version", action="version", version=f"unlearn_fast {unlearn_fast.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, devices, and what serves each operator here, and why")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    verify = commands.add_parser("verify", help="check every operator on this machine against float64")
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.add_argument("--device", choices=DEVICES, help="only on this device; by default on all there are")
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="time every operator against its rivals and this machine's ceilings")
    bench.add_argument("operators", nargs="*", metavar="OP", help="only these operators")
    bench.add_argument(
        "--quick", action="store_true", help="smallest cases: shows that all works; the times mean little"
    )
    bench.add_argument("--device", choices=DEVICES, default="cpu", help="where (default: cpu)")
    bench.add_argument("--case", metavar="TEXT", help="only the cases whose name contains TEXT")
    bench.add_argument("--no-rivals", action="store_true", help="only ours, the yardsticks and the ceilings")
    bench.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE", help="write JSON to FILE, or print it")
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times to FILE.png")
    bench.add_argument("--threads", type=int, metavar="N", help="threads that torch and the operators use")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="watch real models forget: SSD on digits, FLAT on a small language model")
    demo.add_argument("--quick", action="store_true", help="smaller models and fewer steps")
    demo.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="for tables and pictures (default: out)"
    )
    demo.set_defaults(run=_demo)

    ssd.add_parser(commands)
    dampen.add_parser(commands)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    from unlearn_fast import info

    collected = info.collect()
    print(as_text(collected) if arguments.json else info.text(collected))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from unlearn_fast import verify

    _check_device(arguments.device, "verify")
    devices = None if arguments.device is None else [arguments.device]
    checks = list(_progress(verify.run_checks(devices), "verify", unit="check"))
    print(as_text(verify.as_json(checks)) if arguments.json else verify.text(checks))
    return 0 if all(check.passed for check in checks) else 1


def _check_device(device: str | None, command: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{command}: --device is 'cuda', and torch {torch.__version__} sees no GPU here")


def _bench(arguments: argparse.Namespace) -> int:
    from unlearn_fast.benchmarking import cases, report
    from unlearn_fast.benchmarking.measure import measure

    _check_device(arguments.device, "bench")
    _check_bench(arguments, cases.operators())
    chosen = [
        case
        for case in cases.on(arguments.device, quick=arguments.quick)
        if (not arguments.operators or case.operator in arguments.operators) and (arguments.case or "") in case.name
    ]
    if not chosen:
        raise UsageError(f"bench: --case is {arguments.case!r}: no case that was asked for has it in its name")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.no_rivals:
        chosen = [dataclasses.replace(case, rivals={}, libraries={}) for case in chosen]
    prints = arguments.json != STDOUT
    if prints:
        print(report.explained(chosen))
    outcomes = []
    for case in _progress(chosen, "bench", unit="case"):  # each is told, and written, as soon as it is measured
        outcomes.append(measure(case, cold=not arguments.quick))
        if prints:
            print("\n" + report.text(outcomes[-1]), flush=True)
            if arguments.json is not None:
                Path(arguments.json).write_text(as_text(report.as_json(outcomes, _command(arguments))) + "\n")
    if not prints:
        print(as_text(report.as_json(outcomes, _command(arguments))))
    if arguments.plot is not None:
        from unlearn_fast.benchmarking.plot import plot

        plot(outcomes, arguments.plot)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _check_bench(arguments: argparse.Namespace, operators: list[str]) -> None:
    """Finds what is wrong before minutes are spent."""
    for name in arguments.operators:
        if name not in operators:
            raise UsageError(f"bench: no operator {name!r}: choose from {', '.join(operators)}")
    if arguments.json in operators:
        raise UsageError(f"bench: --json takes {arguments.json!r} as its file: name the operators before the options")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"bench: --threads is {arguments.threads}: it must be at least 1")
    if arguments.plot is not None:
        _require(PLOT_NEEDS, "bench --plot")
        if arguments.plot.suffix != ".png":
            raise UsageError(f"bench: --plot is {str(arguments.plot)!r}: it must end in .png")
    for file in (arguments.json, arguments.plot):
        if file not in (None, STDOUT):
            _make_parent(Path(file))


def _make_parent(file: Path) -> None:
    if file.is_dir():
        raise UsageError(f"bench: {file} is a directory: it must be a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"bench: {file} cannot be written: {error}") from error


def _command(arguments: argparse.Namespace) -> str:
    """The command that measures the same again."""
    words = ["unlearn_fast", "bench", *arguments.operators]
    words += ["--quick"] if arguments.quick else []
    words += ["--device", arguments.device] if arguments.device != "cpu" else []
    words += ["--case", shlex.quote(arguments.case)] if arguments.case else []
    words += ["--no-rivals"] if arguments.no_rivals else []
    words += ["--threads", str(arguments.threads)] if arguments.threads is not None else []
    return " ".join(words)


def _demo(arguments: argparse.Namespace) -> int:
    _require(DEMO_NEEDS, "demo")
    from unlearn_fast import demo

    demo.main(arguments.out, quick=arguments.quick)
    return 0


def _require(modules: Mapping[str, str], command: str) -> None:
    """Raises where one of the modules is not installed, naming the extra that brings it."""
    for module, extra in modules.items():
        try:
            require(module, extra, command)
        except ImportError as error:
            raise UsageError(str(error)) from error


def _progress(items: Iterable[Any], name: str, unit: str) -> Iterable[Any]:
    """A bar in a terminal; elsewhere nothing, for which nothing is imported."""
    if not sys.stderr.isatty():
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=name, unit=unit, leave=False, file=sys.stderr)
