"""What dampening a checkpoint on disk costs, beside `cp` of the same file.

`python benchmarks/bench_checkpoint.py --gib 4 --dir DIR` writes a float32 model of 4 GiB and two sets of importances
into a folder of its own in DIR (16 GiB in all, for a while), checks the result, and times both in turns, with and
without fsync. `cp` moves 2 bytes a byte of the model (one read, one written), dampening 4 (three read). Inputs come
from the system's file cache where they fit; `--cold` asks the system to forget them before each run.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open

from unlearn_fast import checkpoint, dampen_

ROUNDS = 5
COLUMNS = 4096  # of each tensor
SETTINGS = {"alpha": 10.0, "lam": 1.0}
CP_MOVES, OURS_MOVE = 2, 4  # bytes a byte of the model


def test_checkpoint(benchmark: Callable, tmp_path: Path) -> None:
    files = make_files(tmp_path, 1 << 20)
    check(files, tmp_path / "out")
    benchmark.extra_info.update(bytes=OURS_MOVE << 20)
    benchmark.pedantic(
        dampen, setup=lambda: (tmp_path / "out").unlink(missing_ok=True) or ((files, tmp_path / "out"), {}), rounds=3
    )


def dampen(files: list[Path], out: Path) -> None:
    checkpoint.dampen(*files, out, progress=False, **SETTINGS)


def make_files(folder: Path, size: int) -> list[Path]:
    """Model, forget and reference of `size` bytes each, in tensors of at most 256 MiB; a third is selected."""
    rows = size // (4 * COLUMNS)
    tensors = max(1, size >> 28)
    bounds = [rows * i // tensors for i in range(tensors + 1)]
    generator = torch.Generator().manual_seed(0)
    files = []
    for name in ("model", "forget", "reference"):
        values = torch.randn(min(size >> 2, 1 << 24), generator=generator)  # repeated, as drawing takes long
        data = (values if name == "model" else (3 * values - 20).exp()).numpy().tobytes()
        header = {
            f"layers.{i}.weight": {
                "dtype": "F32",
                "shape": [end - begin, COLUMNS],
                "data_offsets": [4 * COLUMNS * begin, 4 * COLUMNS * end],
            }
            for i, (begin, end) in enumerate(itertools.pairwise(bounds))
        }
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        files.append(folder / f"{name}.safetensors")
        with files[-1].open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for at in range(0, rows * COLUMNS * 4, len(data)):
                file.write(data[: rows * COLUMNS * 4 - at])
            file.flush()
            os.fsync(file.fileno())
    return files


def check(files: list[Path], out: Path) -> None:
    """Nothing is timed that is wrong: every bit is compared with `dampen_` in memory."""
    dampen(files, out)
    with contextlib.ExitStack() as stack:
        model, forget, reference, result = (stack.enter_context(safe_open(f, "pt")) for f in (*files, out))
        for name in model.keys():  # noqa: SIM118, as it is no mapping
            p = model.get_tensor(name)
            report = dampen_([p], [forget.get_tensor(name)], [reference.get_tensor(name)], **SETTINGS)
            if report.total.selected == 0 or not torch.equal(p, result.get_tensor(name)):
                raise SystemExit(f"not timed: {name} is wrong")
    out.unlink()


def peak_bytes(files: list[Path], out: Path) -> int:
    """Resident memory beyond an interpreter that has imported torch and run the operator, in a process of its own."""
    command = [sys.executable, __file__, "--peak", *map(str, (*files, out))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    out.unlink()
    return int(done.stdout)


def print_peak(files: list[Path], out: Path) -> None:
    def resident(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) << 10

    dampen_([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], **SETTINGS)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = resident("VmRSS")
    dampen(files, out)
    print(resident("VmHWM") - before)


@contextlib.contextmanager
def without_sync() -> Iterator[None]:
    with mock.patch.object(os, "fsync", lambda file: None), mock.patch.object(os, "fdatasync", lambda file: None):
        yield


def copy(source: Path, out: Path, *, sync: bool) -> None:
    subprocess.run(["cp", str(source), str(out)], check=True)
    if sync:
        with out.open("rb") as file:
            os.fsync(file.fileno())


def ours(files: list[Path], out: Path, *, sync: bool) -> None:
    with contextlib.nullcontext() if sync else without_sync():
        dampen(files, out)


def forget_files(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(files: list[Path], out: Path, rounds: int, cold: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round: of cp and ours, with and without fsync, in turns."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for sync in (False, True):
            for name in ("cp", "ours"):
                if cold:
                    forget_files(files)
                begun = time.perf_counter()
                copy(files[0], out, sync=sync) if name == "cp" else ours(files, out, sync=sync)
                ended = time.perf_counter()
                seconds.setdefault("with fsync" if sync else "no fsync", {}).setdefault(name, []).append(ended - begun)
                out.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model (default: 1)")
    parser.add_argument("--dir", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all four runs (default: {ROUNDS})")
    parser.add_argument("--cold", action="store_true", help="read the inputs from the disk, as far as the system obeys")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds of every round to FILE")
    parser.add_argument("--peak", type=Path, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return print_peak(arguments.peak[:3], arguments.peak[3])
    folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint", dir=arguments.dir))
    try:
        files, out = make_files(folder, int(arguments.gib * (1 << 30))), folder / "out.safetensors"
        check(files, out)
        peak = peak_bytes(files, out)
        seconds = measure(files, out, arguments.rounds, arguments.cold)
        size = files[0].stat().st_size
    finally:
        shutil.rmtree(folder)
    print(f"{size / 2**30:.2f} GiB float32, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of")
    print(f"{arguments.rounds} rounds; peak resident memory {peak / 2**20:.1f} MiB beyond interpreter and torch")
    print(f"{'':12}{'cp':>24}{'ours':>24}{'by bytes moved':>18}{'by time':>10}")
    for name, of in seconds.items():
        cp, own = statistics.median(of["cp"]), statistics.median(of["ours"])
        rates = CP_MOVES * size / cp, OURS_MOVE * size / own
        cells = [f"{s:.2f} s, {rate / 1e9:.2f} GB/s" for s, rate in zip((cp, own), rates, strict=True)]
        print(f"{name:12}{cells[0]:>24}{cells[1]:>24}{rates[1] / rates[0]:>17.2f}x{own / cp:>9.2f}x")
        for entrant, times in of.items():
            print(f"{'':12}{entrant}: {', '.join(f'{s:.2f}' for s in times)}")
    if arguments.json is not None:
        record = {"bytes": size, "peak_bytes": peak, "threads": torch.get_num_threads(), "seconds": seconds}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
