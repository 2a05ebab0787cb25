"""Files that appear under their name only when they are complete and on the disk; and which of them hold weights."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

# Files that may hold a model's weights, whatever wrote them: a copy would still hold what was to be forgotten.
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".npz"),
    *(".npy", ".pkl", ".pickle", ".tflite", ".mlmodel", ".nemo", ".distcp", ".tar", ".gz", ".zip"),
)


def sync(path: Path) -> None:
    """Until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
