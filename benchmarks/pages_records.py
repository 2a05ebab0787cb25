"""What the pages need of a record: its cases and timings by name, and figures as text."""

import hashlib
import json
import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMAND = re.compile(r"(?:unlearn_fast bench|make gpu-check|python3? benchmarks/\w+\.py)(?: (?:'[^']*'|[-\w./=]*\w))*")


def load(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def digest(files: Iterable[Path]) -> str:
    """Of records, byte for byte: a plot tells in its metadata which it was made from."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def bench_of(record: dict[str, Any]) -> dict[str, Any]:
    """What `bench --json` wrote, be it the record itself or a part of a GPU's; empty where it was not run."""
    return record if "cases" in record else record.get("bench") or {}


def cases_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return bench_of(record).get("cases", [])


def name(case: dict[str, Any]) -> str:
    """As `Case.name`."""
    text = f"{case['operator']} {case['shape']} {case['dtype']}"
    return f"{text}, {case['variant']}" if case["variant"] else text


def case_of(record: dict[str, Any], wanted: str) -> dict[str, Any]:
    for case in cases_of(record):
        if name(case) == wanted:
            return case
    raise ValueError(f"a table asks for {wanted!r}, which the record does not have")


def timing_of(case: dict[str, Any], start: str) -> dict[str, Any]:
    """The first whose name begins so."""
    for timing in case["timings"]:
        if timing["name"].startswith(start):
            return timing
    raise ValueError(f"a table asks for {start!r}, which {name(case)!r} does not have")


def ours(case: dict[str, Any]) -> dict[str, Any]:
    """Our time: of the Fisher, that of a further batch."""
    first, *others = case["timings"]
    return next((t for t in others if t["kind"] == "ours" and t["ms"]), first)


def baseline(case: dict[str, Any]) -> dict[str, Any]:
    """Whose time is the unit of the case."""
    return next((t for t in case["timings"] if t["name"] == case["baseline"]), case["timings"][0])


def ratio(timing: dict[str, Any] | None, unit: dict[str, Any] | None) -> float | None:
    return timing["ms"] / unit["ms"] if timing and unit and timing["ms"] and unit["ms"] else None


def absent(timing: dict[str, Any]) -> bool:
    """Not timed because it is not installed: which says nothing about it."""
    return "ModuleNotFoundError" in timing["failure"]


def spread(timing: dict[str, Any]) -> float | None:
    """Interquartile range of the rounds over their median, from the rounds, which every record has."""
    if len(timing["rounds_ms"]) < 2:
        return None
    lower, median, upper = statistics.quantiles(timing["rounds_ms"], n=4, method="inclusive")
    return (upper - lower) / median


def times(value: float | None) -> str:
    """A ratio."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 3 else f"{value:.1f}" if value < 20 else f"{value:.0f}"


def percent(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def commands(text: str) -> str:
    """With the commands in it marked as code."""
    return COMMAND.sub(lambda found: f"`{found[0]}`", text)


def paragraph(text: str) -> str:
    """In lines of the pages' length."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def setting(record: dict[str, Any], link: str) -> str:
    """How the figures were made, in a sentence."""
    bench = bench_of(record)
    machine, versions = bench["machine"], bench["versions"]
    place = ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['threads']} threads, {machine['simd']}"
    packages = ["torch", "triton"] if machine["gpus"] else ["torch"]
    listed = ", ".join(f"{package} {versions[package]}" for package in packages)
    rounds = f"medians of at most {bench['method']['rounds']} interleaved rounds"
    file = f"[{link.rpartition('/')[2]}]({link})"
    return f"{place}; {listed}; {rounds}; {commands(bench['command'])}. The record is {file}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
