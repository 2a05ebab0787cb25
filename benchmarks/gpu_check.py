"""Everything that a GPU has to prove, in one command: `make gpu-check OUT=folder`.

Builds the extension for the GPU at hand; runs the tests' GPU half, the benchmarks with rivals and ceilings, end-to-end
cases among them, a sweep of the Triton kernels' configurations, and compute-sanitizer over the CUDA C++ kernels. Writes
gpu.json (see docs/records.md), gpu.md (its tables), and what the parts printed: build.txt, tests.txt, bench.txt,
sanitizer.txt. Needs no network, and at most 9 minutes: the benchmarks have what the others leave.

Without a GPU, says so and runs what needs none: the Triton kernels in the interpreter, and all kernels compiled ahead
of time, with their registers, spills, bytes and operations.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_build
import torch
from pages import markdown

ROOT = gpu_build.ROOT
LIMIT = 540.0  # seconds, of all parts
LIMITS = {"build": 180.0, "tests": 150.0, "tuning": 45.0, "sanitizer": 20.0}  # of one; sanitizer: of each tool
RESERVED = LIMITS["tuning"] + 2 * LIMITS["sanitizer"]  # by the benchmarks, for what follows them
SANITIZERS = ("memcheck", "racecheck", "initcheck")
SANITIZED = ["tests/test_dampen_gpu.py", "-k", "alignments or several_dtypes or two_dtypes or exponents"]
WITHOUT_GPU = [f"tests/test_{name}.py" for name in ("triton", "triton_compiled", "cuda_compiled")]
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rfE", "-p", "no:warnings", "-p", "no:cacheprovider"]


@dataclass
class Step:
    """One part of the check."""

    name: str
    status: str = ""  # "passed", "failed", or why it did not run, or not to its end
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class Check:
    """The parts that have run, and the record that they fill in, which is written after each."""

    def __init__(self, out: Path) -> None:
        self.out, self.end = out, time.monotonic() + LIMIT
        self.steps: list[Step] = []
        self.record: dict[str, Any] = {"schema": 1, "command": "make gpu-check OUT=folder"}

    def left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def add(self, name: str, part: Callable[[Step], None]) -> None:
        step = Step(name)
        start = time.perf_counter()
        part(step)
        step.seconds = time.perf_counter() - start
        self.steps.append(step)
        print(f"{step.name:<12} {step.status:<34} {step.seconds:6.1f} s  {step.facts}", flush=True)
        self.record["steps"] = [asdict(step) for step in self.steps]
        (self.out / "gpu.json").write_text(json.dumps(self.record, indent=1) + "\n")
        (self.out / "gpu.md").write_text(markdown(self.record))

    def run(self, step: Step, command: list[str], log: str, limit: float, **environment: str) -> str:
        """Runs a command, tells the step how it ended, and returns what it printed, which also goes to a file."""
        limit = min(limit, self.left())
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit,
                env=os.environ | environment,
            )  # fmt: skip
            printed, step.status = done.stdout, "failed" if done.returncode else "passed"
        except subprocess.TimeoutExpired as expired:
            printed, step.status = expired.stdout or b"", f"stopped after {limit:.0f} s"
        text = printed.decode(errors="replace")
        with (self.out / log).open("a") as file:
            file.write(f"{' '.join(command[1:])}\n{text}\n")
        return text

    def rows(self, step: Step, command: list[str], limit: float) -> Any:
        """What a command writes to the file that its last argument names; None where it does not."""
        file = self.out / "part.json"
        file.unlink(missing_ok=True)
        self.run(step, [*command, str(file)], "bench.txt", limit)
        if not file.exists():
            return None
        found = json.loads(file.read_text())
        file.unlink()
        return found

    # The parts

    def build(self, step: Step) -> None:
        """For the GPU at hand, and with what the assembler says of each kernel."""
        architecture = "".join(map(str, torch.cuda.get_device_capability()))
        gpu_build.clean()
        options = gpu_build.options(architecture)
        log = self.run(step, gpu_build.command(), "build.txt", LIMITS["build"], CMAKE_ARGS=options)
        rows = self.record["resources"] = gpu_build.told_by_the_assembler(log)
        spilled = [row["name"] for row in rows if row["spill_stores"] or row["spill_loads"]]
        step.facts = {"architecture": f"sm_{architecture}", "kernels": len(rows), "spilled": len(spilled)}
        if step.status == "passed" and (not rows or spilled):
            step.status = "failed"

    def environment(self, step: Step) -> None:
        """Of a process of its own, which finds what has been built."""
        log = self.run(step, [sys.executable, "-m", "unlearn_fast", "info", "--json"], "build.txt", 60)
        if step.status == "passed":
            self.record["environment"] = _first_json(log) | {"gpu": gpu()}

    def tests(self, step: Step, files: list[str], limit: float) -> None:
        workers = min(8, (os.cpu_count() or 1) // 2)
        parallel = ["-n", str(workers)] if find_spec("xdist") and workers > 1 and torch.cuda.is_available() else []
        log = self.run(step, [*PYTEST, "--noconftest", *parallel, *files], "tests.txt", limit)
        step.facts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", log)}
        named = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
        self.record["tests"] = step.facts | {"files": files, "failures": named}

    def bench(self, step: Step) -> None:
        command = [sys.executable, "-m", "unlearn_fast", "bench", "--device", "cuda", "--json"]
        found = self.rows(step, command, self.left() - RESERVED)
        if found:
            self.record["bench"] = found
            step.facts = {"cases": len(found["cases"])}

    def tuning(self, step: Step) -> None:
        seconds = str(LIMITS["tuning"] - 15)  # no further kernel is begun; the last has the rest
        command = [sys.executable, "benchmarks/gpu_tune.py", "--seconds", seconds]
        self.record["tuning"] = self.rows(step, command, LIMITS["tuning"]) or []
        improved = [row["kernel"] for row in self.record["tuning"] if row["best"] != row["shipped"]]
        step.facts = {"swept": len(self.record["tuning"]), "another is faster": len(improved)}

    def sanitizer(self, step: Step, tool: str) -> None:
        program = shutil.which("compute-sanitizer")
        if program is None:
            step.status = "not run: compute-sanitizer is not installed"
            return
        # initcheck would see memory that torch allocates and leaves for others to write
        only = ["--kernel-regex", "kernel_substring=dampen"] if tool == "initcheck" else []
        command = [program, "--tool", tool, *only, *PYTEST, "--noconftest", *SANITIZED]
        log = self.run(step, command, "sanitizer.txt", LIMITS["sanitizer"])
        step.facts = {"summary": next(iter(re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)), "none")}
        self.record.setdefault("sanitizer", {})[tool] = step.facts["summary"]

    def ahead_of_time(self, step: Step) -> None:
        """Registers, stack and shared memory of every kernel, for each architecture."""
        command = [sys.executable, "-m", "unlearn_fast.ops.resources", "--json"]
        rows = self.record["resources"] = self.rows(step, command, self.left()) or []
        step.facts = {"kernels": len(rows), "with a stack": sum(row["stack"] > 0 for row in rows)}

    def floors(self, step: Step) -> None:
        """Bytes and operations, as the interpreter counts them and at the least."""
        command = [sys.executable, "-m", "unlearn_fast.ops.traffic", "--json"]
        rows = self.record["floors"] = self.rows(step, command, self.left()) or []
        step.facts = {"counted": len(rows)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--prebuilt", action="store_true", help="take the extension as it lies there")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("build.txt", "tests.txt", "bench.txt", "sanitizer.txt"):
        (options.out / name).unlink(missing_ok=True)
    check = Check(options.out.resolve())
    if torch.cuda.is_available():
        on_gpu(check, options.prebuilt)
    else:
        print(f"torch {torch.__version__} sees no GPU here: kernels are interpreted, and compiled ahead of time, only")
        check.end += 3600  # nothing keeps a GPU waiting
        check.add("environment", check.environment)
        check.add("tests", lambda step: check.tests(step, WITHOUT_GPU, check.left()))
        check.add("resources", check.ahead_of_time)
        check.add("floors", check.floors)
    return 1 if any(step.status == "failed" or unfinished(step) for step in check.steps) else 0


def unfinished(step: Step) -> bool:
    """Whether it was stopped, and should not have been: benchmarks, sweeps and sanitizers take what time there is."""
    return step.name in ("build", "environment", "tests") and step.status != "passed"


def on_gpu(check: Check, prebuilt: bool) -> None:
    if not prebuilt:
        check.add("build", check.build)
    check.add("environment", check.environment)
    files = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/test_*gpu.py"))
    check.add("tests", lambda step: check.tests(step, files, LIMITS["tests"]))
    check.add("benchmarks", check.bench)
    check.add("tuning", check.tuning)
    for tool in SANITIZERS:
        check.add(tool, lambda step, tool=tool: check.sanitizer(step, tool))


def _first_json(text: str) -> Any:
    """Among lines of warnings, say."""
    return json.JSONDecoder().raw_decode(text, text.index("{"))[0]


def gpu() -> dict[str, Any]:
    """What there is to know of the first one; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    found, smi = torch.cuda.get_device_properties(0), shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit", "--format=csv"]
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.splitlines() if smi else [],
    }


if __name__ == "__main__":
    sys.exit(main())
