"""What is installed here, and which implementation serves each operator, and why."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import unlearn_fast
from unlearn_fast import _library

# Operators that are torch's matrix products around another operator, on every device.
COMPOSED = {
    "linear_token_logprobs": "token_logprobs",
    "linear_token_logprobs_backward": "token_logprobs_backward_",
}


def collect() -> dict[str, Any]:
    """Versions, machine, build, missing parts and the operators' implementations, ready for JSON."""
    return {
        "versions": versions(),
        "machine": machine(),
        "build": _build(),
        "missing": dict(_library.missing),
        "operators": {name: {device: _served(name, device) for device in ("cpu", "cuda")} for name in _library.SCHEMAS},
    }


def versions() -> dict[str, str | None]:
    """Package -> version; None where it is not installed. Nothing is imported to find out."""
    found: dict[str, str | None] = {"unlearn_fast": unlearn_fast.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, the threads that the CPU kernels use, their instruction set, and the GPUs."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": _library.native.simd() if _library.native is not None else None,
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
    }


def text(info: dict[str, Any]) -> str:
    """The same for people."""
    versions, machine, build = info["versions"], info["machine"], info["build"]
    facts = {
        "versions": ", ".join(f"{name} {version or '(not installed)'}" for name, version in versions.items()),
        "machine": f"{machine['processor']}, {machine['system']}",
        "cpu": f"{machine['cores']} cores, {machine['threads']} threads, SIMD {machine['simd'] or 'unknown'}",
        "gpus": ", ".join(machine["gpus"]) or "none",
        "compiler": build["compiler"] or "not built",
        "cuda build": _cuda_build(build),
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    lines += ["", "missing parts"] + [f"  {part}: {reason}" for part, reason in info["missing"].items()]
    if not info["missing"]:
        lines[-1] += ": none"
    for device in ("cpu", "cuda"):
        rows = [(name, *served[device].values()) for name, served in info["operators"].items()]
        lines += ["", *table((f"operator on {device}", "served by", "why"), rows)]
    return "\n".join(lines)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]


def _processor() -> str:
    try:  # platform.processor() is empty on most Linux systems
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _build() -> dict[str, Any]:
    built = _library.native.build_info() if _library.native is not None else {}
    return {
        "compiler": built.get("compiler"),
        "cuda_architectures": built.get("cuda_architectures", "").split(),
        "cuda_version": built.get("cuda_version") or None,
        "cuda_missing": built.get("cuda_missing") or None,
    }


def _cuda_build(build: dict[str, Any]) -> str:
    if build["cuda_architectures"]:
        return f"CUDA {build['cuda_version']} for sm_{', sm_'.join(build['cuda_architectures'])}"
    return f"none: {build['cuda_missing'] or 'not built'}"


def _served(name: str, device: str) -> dict[str, str]:
    implementation, part = _library.implementation(name, device), _library.part_on(name, device)
    if implementation == "reference" and name in COMPOSED:
        inner = COMPOSED[name]
        why = f"torch's matrix products in chunks of rows, then {inner} ({_library.implementation(inner, device)})"
        return {"implementation": "composed", "why": why}
    if implementation == "reference":
        return {"implementation": implementation, "why": _library.missing.get(part, f"it has no {device} kernel")}
    if device == "cpu":
        return {"implementation": implementation, "why": "compiled part _cpu is loaded"}
    if not torch.cuda.is_available():
        return {"implementation": implementation, "why": "its kernel is loaded, but no CUDA device is visible"}
    return {"implementation": implementation, "why": "its kernel is loaded"}
