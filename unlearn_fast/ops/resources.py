"""Registers, stack and shared memory of the Triton kernels, compiled ahead of time: needs triton, but no GPU.

`python -m unlearn_fast.ops.resources` prints the table of docs/kernels.md. Every kernel is compiled exactly as a launch
would compile it: the launchers run on CPU tensors, and what they would launch is recorded instead. A stack that is not
0 means spilled registers.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
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


class Shipped(NamedTuple):
    """One configuration that a launcher may choose: what to call it, and a launch."""

    title: str
    launch: Callable[[], Any]


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
    """Read from the machine code by NVIDIA's cuobjdump, which comes with triton."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return Usage(int(found[1]), int(found[2]), kernel.metadata.shared)


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


def table() -> Iterator[str]:
    """Markdown: registers a thread, and the stack where it is not 0; kinds of inputs with equal figures share a row."""
    yield f"| kernel | inputs | {' | '.join(f'sm_{a}' for a in ARCHITECTURES)} | shared memory |"
    yield "|" + "---|" * (3 + len(ARCHITECTURES))
    for operator in OPERATORS:
        rows: dict[tuple[str, str], list[str]] = {}
        for kind in KINDS:
            for title, recorded in dict(shipped(operator, kind)).items():
                found = [usage(compiled(recorded, a)) if recorded.serves(a) else None for a in ARCHITECTURES]
                cells = ["-" if u is None else f"{u.registers}" + (f", stack {u.stack}" * bool(u.stack)) for u in found]
                figures = f"{' | '.join(cells)} | {max(u.shared for u in found if u) / 1024:.0f} KiB"
                rows.setdefault((title, figures), []).append(kind)
        for (title, figures), kinds in rows.items():
            yield f"| {operator}: {title} | {'; '.join(kinds)} | {figures} |"


if __name__ == "__main__":
    for line in table():
        print(line)
        sys.stdout.flush()
