"""Everything that a GPU has to prove, in one command: `make gpu-check OUT=folder`.

Kernels' resources, the tests' GPU half, compute-sanitizer over the CUDA C++ kernels, and the benchmarks with rivals and
ceilings. Writes gpu_check.json (what ran, how long, with what result), bench.json (as `unlearn_fast bench --json`),
gpu.md (its table), tests.txt and sanitizer.txt to the folder. Needs no network; takes at most about 6 minutes without
the build.

Without a GPU, says so and runs what needs none: the Triton kernels in the interpreter, and compiled ahead of time.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pages import markdown

from unlearn_fast import info
from unlearn_fast.ops import resources

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("triton_gpu", "triton_rows_gpu", "dampen_gpu", "gpu")]
WITHOUT_GPU = [f"tests/test_{name}.py" for name in ("triton", "triton_compiled", "cuda_compiled")]
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:warnings"]
SANITIZED = ["tests/test_dampen_gpu.py", "-k", "alignments or several_dtypes or two_dtypes or exponents"]


@dataclass
class Step:
    """One part of the check."""

    name: str
    status: str = ""  # "passed", "failed", or why it did not run
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--bench-seconds", type=float, default=240, help="limit of the benchmarks (default: 240)")
    parser.add_argument("--test-seconds", type=float, default=240, help="limit of the tests (default: 240)")
    parser.add_argument("--workers", type=int, default=1, help="of the tests, where pytest-xdist is installed")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} sees no GPU here: the kernels are interpreted, and compiled ahead of time, only"
        )
        return subprocess.run([*PYTEST, *WITHOUT_GPU], cwd=ROOT).returncode
    for name in ("tests.txt", "sanitizer.txt"):
        (arguments.out / name).unlink(missing_ok=True)
    steps = [
        cuda_resources(),
        tests(arguments.out / "tests.txt", arguments.workers, arguments.test_seconds),
        bench(arguments.out, arguments.bench_seconds),
        *(sanitizer(tool, arguments.out / "sanitizer.txt") for tool in ("memcheck", "racecheck", "initcheck")),
    ]
    record = {"versions": info.versions(), "machine": info.machine(), "steps": [asdict(step) for step in steps]}
    (arguments.out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
    for step in steps:
        told = step.facts if len(step.facts) < 10 else f"{len(step.facts)} kernels"
        print(f"{step.name:<12} {step.status:<40} {step.seconds:6.1f} s  {told}")
    return 1 if any(step.status == "failed" for step in steps) else 0


def cuda_resources() -> Step:
    """Registers, stack (where some are spilled) and shared memory of the CUDA C++ kernels, from their machine code."""
    step, library = Step("resources"), ROOT / "unlearn_fast/_cuda.so"
    start = time.perf_counter()
    try:
        found = resources.resource_usage(library) if library.exists() else []
    except FileNotFoundError as missing:
        step.status = f"not run: {missing}"
        return step
    step.seconds = time.perf_counter() - start
    step.status = ("failed" if any(u.stack for _, _, u in found) else "passed") if found else "not run: not built"
    step.facts = {f"{name}, sm_{architecture}": usage._asdict() for name, architecture, usage in found}
    return step


def tests(file: Path, workers: int, limit: float) -> Step:
    step = Step("tests")
    parallel = ["-n", str(workers)] if workers > 1 else []
    text = _run(step, [*PYTEST, "--noconftest", *parallel, *TESTS], file, limit)
    step.facts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text)}
    return step


def sanitizer(tool: str, file: Path) -> Step:
    step, program = Step(tool), shutil.which("compute-sanitizer")
    if program is None:
        step.status = "not run: compute-sanitizer is not installed"
        return step
    # initcheck would see memory that torch allocates and leaves for others to write
    only = ["--kernel-regex", "kernel_substring=dampen"] if tool == "initcheck" else []
    text = _run(step, [program, "--tool", tool, *only, *PYTEST, "--noconftest", *SANITIZED], file, 60, append=True)
    step.facts = {"summary": next(iter(re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)), "none")}
    return step


def bench(out: Path, limit: float) -> Step:
    step, file = Step("benchmarks"), out / "bench.json"
    file.unlink(missing_ok=True)
    _run(step, [sys.executable, "-m", "unlearn_fast", "bench", "--device", "cuda", "--json", str(file)], None, limit)
    if file.exists():  # each case is written as soon as it is measured
        record = json.loads(file.read_text())
        (out / "gpu.md").write_text(markdown(record))
        step.facts = {"cases": len(record["cases"])}
    return step


def _run(step: Step, command: list[str], file: Path | None, limit: float, *, append: bool = False) -> str:
    """Runs a command, fills the step in, and returns what it printed, which also goes to the file."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
        )
        text, step.status = done.stdout, "failed" if done.returncode else "passed"
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        step.status = f"stopped after {limit:.0f} s"
    step.seconds = time.perf_counter() - start
    if file is not None:
        with file.open("a" if append else "w") as output:
            output.write(f"{' '.join(command[1:])}\n{text}\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
