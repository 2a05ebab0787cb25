"""Builds the extension for the GPU at hand, and keeps what the assembler says of every CUDA C++ kernel."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "build/gpu"  # of its own: an assembler tells of what it compiles, and of nothing that lies there already


def command() -> list[str]:
    return [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", FOLDER]


def options(architecture: str) -> str:
    """For CMAKE_ARGS; an architecture as in 90 for sm_90."""
    return f"-DCMAKE_CUDA_ARCHITECTURES={architecture} -DCMAKE_CUDA_FLAGS=-Xptxas=-v"


def clean() -> None:
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)


def told_by_the_assembler(log: str) -> list[dict[str, Any]]:
    """Rows of name, architecture, registers (a thread), stack, spill_stores and spill_loads (bytes a thread) and
    shared (bytes a block), from what `ptxas -v` prints.
    """
    rows: list[dict[str, Any]] = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)\w*'", line):
            rows.append({"name": match[1], "architecture": int(match[2])})
        elif not rows:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            rows[-1] |= dict(zip(("stack", "spill_stores", "spill_loads"), map(int, match.groups()), strict=True))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows[-1] |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    for row, name in zip(rows, _demangled([row["name"] for row in rows]), strict=True):
        row["name"] = name
    return rows


def _demangled(names: list[str]) -> list[str]:
    """As people write them, where a tool that knows is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    told = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return told.splitlines()
