"""Checkpoints on disk for the tests, and what must come out, byte for byte."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unlearn_fast import checkpoint, dampen_

Tensors = dict[str, Tensor]
DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
SETTINGS = {"alpha": 1.0, "lam": 0.7}
CODES = {dtype: code for code, dtype in DTYPES.items()} | {torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def importance(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Over some orders of magnitude, with zeros, infinities and NaN among them."""
    t = (3 * values(*shape, seed=seed) - 2).exp().reshape(-1)
    for i, special in enumerate((0.0, float("inf"), float("nan"))):
        t[7 + 5 * seed + i :: 97] = special
    return t.reshape(shape).to(dtype)


def trio(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors, Tensors]:
    model = {name: values(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    forget = {name: importance(*shape, seed=3 * i + 1) for i, (name, shape) in enumerate(shapes.items())}
    reference = {name: importance(*shape, seed=3 * i + 2) for i, (name, shape) in enumerate(shapes.items())}
    return model, forget, reference


def raw_bytes(t: Tensor) -> bytes:
    return bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist())


def write_file(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def write_raw(path: Path, tensors: Tensors, *, padding: int = 0, **changes: object) -> Path:
    """In the order given, with `padding` spaces after the header; `changes` are made in the header."""
    header: dict[str, object] = {}
    at = 0
    for name, t in tensors.items():
        data = raw_bytes(t)
        header[name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header | changes).encode() + b" " * padding
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(map(raw_bytes, tensors.values())))
    return path


def write_shards(folder: Path, shards: list[Tensors]) -> Path:
    folder.mkdir()
    places = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, tensors, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def in_memory(model: Tensors, forget: Tensors, reference: Tensors, **settings: float) -> tuple[Tensors, object]:
    """What `dampen_` makes of it; tensors without importances as they are."""
    bare = {name.removeprefix("module.") for name in forget}
    result = {name: t.clone() for name, t in model.items() if name.removeprefix("module.") in bare}
    report = dampen_(result, forget, reference, **settings)
    return model | result, report


def expected_bytes(file: Path, dampened: Tensors) -> bytes:
    """The file with other data: everything else is to be kept."""
    raw = bytearray(file.read_bytes())
    data = 8 + int.from_bytes(raw[:8], "little")
    for name, record in json.loads(raw[8:data]).items():
        if name != "__metadata__":
            begin, end = record["data_offsets"]
            raw[data + begin : data + end] = raw_bytes(dampened[name])
    return bytes(raw)


def contents(path: Path) -> dict[str, bytes]:
    """Every file below, or the file itself."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def run(model: Path, forget: Path, reference: Path, out: Path | None, **options: Any) -> checkpoint.CheckpointReport:
    return checkpoint.dampen(model, forget, reference, out, **{**SETTINGS, "progress": False, **options})
