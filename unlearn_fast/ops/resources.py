"""Registers, stack and shared memory of the Triton kernels, compiled ahead of time: needs triton, but no GPU.

`python -m unlearn_fast.ops.resources` prints the table of docs/kernels.md. Every kernel is compiled exactly as a launch
would compile it: the launchers run on CPU tensors, and what they would launch is recorded instead. A stack that is not
0 means spilled registers.
"""

import argparse
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
LIBRARY = Path(__file__).parent.parent / "_cuda.so"  # the kernels in C++
OPERATORS = {  # title -> folder
    "linear": "sum_grad_squared_linear",
    "conv": "sum_grad_squared_conv",
    "embedding": "sum_grad_squared_embedding",
    "scale": "sum_grad_squared_scale",
    "token_logprobs": "token_logprobs",
    "token_kl": "token_kl",
}
KINDS = {  # title -> dtype of the inputs, torch's setting for float32 products
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32, TF32": (torch.float32, "tf32"),
    "float32, IEEE": (torch.float32, "ieee"),
    "float64": (torch.float64, "ieee"),
}
# What the tests check; all pairs take too long for them.
CHECKED = (
    ("bfloat16", 80),
    ("bfloat16", 90),
    ("bfloat16", 100),
    ("float32, TF32", 80),
    ("float32, TF32", 90),
    ("float32, IEEE", 90),
    ("float64", 90),
)


class Recorded(NamedTuple):
    """A launch that was recorded: the kernel, and its arguments."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def serves(self, architecture: int) -> bool:
        """Whether it is launched there: GPUs have a copy engine for blocks from sm_90 on."""
        return architecture >= 90 or not self.options.get("BOXES", False)


class Usage(NamedTuple):
    registers: int  # a thread, at most 255
    stack: int  # bytes a thread
    shared: int  # bytes a program


def shipped(operator: str, kind: str) -> Iterator[tuple[str, Recorded]]:
    """Every kernel that an operator launches for a kind of inputs: title, launch."""
    module = importlib.import_module(f"unlearn_fast.ops.{OPERATORS[operator]}.triton")
    dtype, setting = KINDS[kind]
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        for title, launch in module.shipped(dtype):
            with _recording() as launches:
                launch()
            for recorded in launches:
                name = recorded.kernel.__name__.removesuffix("_kernel")
                yield name if name == "add_parts" else f"{name}, {title}", recorded
    finally:
        matmul.fp32_precision = before


def compiled(recorded: Recorded, architecture: int) -> Any:
    """The kernel as `architecture` (90 for sm_90) would run it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as compile_
    from triton.runtime.jit import create_function_from_signature

    kernel, arguments, options = recorded
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *arguments, **options
    )
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    return compile_(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)


def usage(kernel: Any) -> Usage:
    """Of a Triton kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ((_, _, found),) = resource_usage(Path(file.name))
    return found._replace(shared=kernel.metadata.shared)  # which is asked for at the launch


def resource_usage(file: Path) -> list[tuple[str, int, Usage]]:
    """Name, architecture and usage of every kernel in a cubin, or in a library that holds some: read from the machine
    code by NVIDIA's cuobjdump, which comes with triton and with CUDA."""
    found, architecture, name = [], 0, ""
    for line in subprocess.run(
        [cuobjdump(), "--dump-resource-usage", str(file)], check=True, capture_output=True, text=True
    ).stdout.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found.append((name, architecture, Usage(*map(int, match.groups()))))
    assert found, f"{file} holds no kernels"
    return found


def cuobjdump() -> str:
    """Triton's, or CUDA's."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        own = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if own.exists():
            return str(own)
    path = shutil.which("cuobjdump")
    if path is None:
        raise FileNotFoundError("cuobjdump is needed, which comes with triton and with CUDA: install one of them")
    return path


@contextmanager
def _recording() -> Iterator[list[Recorded]]:
    """Kernels that are launched inside do not run: they are recorded."""
    from triton.runtime.jit import JITFunction

    launches: list[Recorded] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Recorded(self, arguments, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def rows(checked: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Every Triton kernel for these pairs of a kind and an architecture."""
    for operator in OPERATORS:
        for kind, architecture in checked:
            for title, recorded in dict(shipped(operator, kind)).items():
                if recorded.serves(architecture):
                    name = f"{operator}: {title}"
                    found = usage(compiled(recorded, architecture))
                    yield {"name": name, "inputs": kind, "architecture": architecture, **found._asdict()}


def table() -> Iterator[str]:
    """Markdown: registers a thread, and the stack where it is not 0; kinds of inputs with equal figures share a row."""
    yield f"| kernel | inputs | {' | '.join(f'sm_{a}' for a in ARCHITECTURES)} | shared memory |"
    yield "|" + "---|" * (3 + len(ARCHITECTURES))
    kernels: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows([(kind, a) for kind in KINDS for a in ARCHITECTURES]):
        kernels.setdefault(row["name"], {}).setdefault(row["inputs"], {})[row["architecture"]] = row
    for name, by_kind in kernels.items():
        sharing: dict[str, list[str]] = {}
        for kind, found in by_kind.items():
            figures = [_cell(found.get(a)) for a in ARCHITECTURES]
            figures.append(f"{max(row['shared'] for row in found.values()) / 1024:.0f} KiB")
            sharing.setdefault(" | ".join(figures), []).append(kind)
        for text, kinds in sharing.items():
            yield f"| {name} | {'; '.join(kinds)} | {text} |"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['registers']}" + (f", stack {row['stack']}" if row["stack"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows that the tests check, and those of C++"
    )
    file = parser.parse_args().json
    if file is None:
        for line in table():
            print(line, flush=True)
        return
    found = list(rows(CHECKED))
    if LIBRARY.exists():
        of_library = resource_usage(LIBRARY)
        found += [{"name": name, "inputs": "", "architecture": a, **u._asdict()} for name, a, u in of_library]
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
