"""The header of a safetensors file, read and checked here, because the data are streamed and never loaded.

A file is 8 bytes with the header's length N (little-endian), N bytes of JSON, and the data. The JSON maps each name to
dtype, shape and the first and one past last byte in the data; `__metadata__`, where present, maps strings to strings.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

LONGEST_HEADER = 100_000_000  # the format's own limit

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What is dampened, and what importances may be."""

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class Entry(NamedTuple):
    """One tensor; `begin` and `end` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsFile:
    path: Path
    entries: dict[str, Entry]  # in the order of their data
    metadata: dict[str, str]
    header: int  # bytes, the length in front included
    digest: str  # of the header


def read_header(argument: str, path: Path) -> SafetensorsFile:
    """Reads and checks the header; errors begin with the name of the argument that `path` belongs to."""

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"{argument}: {str(path)!r} is no valid safetensors file: {why}")

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            refuse(f"it has {size} bytes, and the length of its header alone takes 8")
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            refuse(f"its header would have {length:,} bytes, and the format allows {LONGEST_HEADER:,}")
        if 8 + length > size:
            refuse(f"its header would have {length:,} bytes, and the file has {size:,}: it is truncated, or damaged")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        refuse(f"its header is no JSON ({error})")
    if not isinstance(header, dict):
        refuse("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("its __metadata__ must map strings to strings")
    data = 8 + length
    entries = []
    for name, record in header.items():
        try:
            entries.append(_entry(name, record, data))
        except ValueError as error:
            refuse(str(error))
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = data
    for entry in entries:
        if entry.begin != at:
            what = "overlap those" if entry.begin < at else "leave a hole after those"
            refuse(f"the data of {entry.name!r} {what} in front of it")
        at = entry.end
    if at != size:
        state = "it is truncated" if at > size else "something follows its data"
        refuse(f"its header describes {at:,} bytes, and it has {size:,}: {state}")
    digest = hashlib.sha256(raw).hexdigest()
    return SafetensorsFile(path, {entry.name: entry for entry in entries}, metadata, data, digest)


def _entry(name: str, record: Any, data: int) -> Entry:
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}: known are {', '.join(BITS)}")
    if not _sizes(shape):
        raise ValueError(f"{name!r} has shape {shape!r}: it must be a list of integers >= 0")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} has data_offsets {offsets!r}: they must be [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(
            f"{name!r} has {end - begin:,} bytes of data: {dtype} of shape {shape} needs"
            f" {math.prod(shape) * BITS[dtype] / 8:,.10g}"
        )
    return Entry(name, dtype, tuple(shape), data + begin, data + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return result
