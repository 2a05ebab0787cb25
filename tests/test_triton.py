"""The Triton kernels in Triton's interpreter, each operator in a process of its own: see interpreted.py."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unlearn_fast import _library

pytest.importorskip("triton")

TESTS = Path(__file__).parent


INTERPRETED = ["token_kl", "token_logprobs", "tuning", "linear", "conv", "scale", "traffic", "embedding"]


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """Those that are asked for, two at a time: the interpreter uses one core."""
    asked = {item.callspec.params["operator"] for item in request.session.items if "processes" in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        yield {operator: pool.submit(interpret, operator) for operator in INTERPRETED if operator in asked}


def interpret(operator: str) -> subprocess.CompletedProcess:
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, TESTS / f"interpreted_{operator}.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("operator", INTERPRETED)
def test_interpreted(operator, processes):
    done = processes[operator].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", _library.TRITON)
def test_triton_serves_cuda(name):
    assert _library.implementation(name, "cuda") == "triton"
    assert _library.implementation(name, "cpu") != "triton"


def test_without_triton_the_references_serve_with_one_warning():
    code = """
import json, sys, warnings
sys.modules["triton"] = None
import torch
from unlearn_fast import _library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in _library.TRITON:
        _library.warn_if_slow("cuda", name)
print(json.dumps([
    [str(w.message) for w in caught], [_library.implementation(name, "cuda") for name in _library.TRITON],
    _library.missing["triton"],
]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=300, check=True)
    messages, served, reason = json.loads(done.stdout)
    assert set(served) == {"reference"} and "pip install triton" in reason
    (message,) = messages
    assert reason in message and "on cuda" in message


def test_the_fastest_tile_is_measured_once(monkeypatch):
    from unlearn_fast.ops import _triton

    tiles = [_triton.Tile(64, 64, 64, 4, 3), _triton.Tile(128, 64, 64, 8, 3), _triton.Tile(16, 16, 16, 4, 3)]
    gpu, work, capturing, measured = SimpleNamespace(is_cuda=True), _triton.WORTH_TUNING, [True], []

    def milliseconds(launch, tile):
        measured.append(tile)
        return abs(tile.o - 128)

    monkeypatch.setattr(_triton, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(_triton, "_measured", {})
    assert _triton.choose("key", tiles, tiles[0], gpu, work, print) == tiles[0]  # in a CUDA graph's capture
    capturing[0] = False
    assert _triton.choose("key", tiles, tiles[0], gpu, work - 1, print) == tiles[0]
    assert _triton.choose("key", tiles, tiles[0], torch.ones(1), work, print) == tiles[0]
    assert not measured
    for _ in range(2):
        assert _triton.choose("key", tiles, tiles[0], gpu, work, print) == tiles[1]
    assert measured == tiles


def test_splits_shorten_the_longest_processor():
    from unlearn_fast.ops import _triton

    for tiles, steps, processors in itertools.product((1, 3, 66, 100, 131, 500), (1, 2, 7, 64), (1, 8, 132)):
        parts = _triton.splits(tiles, steps, processors)
        waves, length = math.ceil(tiles * parts / processors), math.ceil(steps / parts)
        assert 1 <= parts <= steps and waves * length <= math.ceil(tiles / processors) * steps
        assert parts == 1 or tiles * parts <= 4 * processors


def test_the_default_tile_wastes_little():
    from unlearn_fast.ops import _triton
    from unlearn_fast.ops.sum_grad_squared_conv.triton import TILES

    tiles = TILES["16 bit"]
    assert _triton.default_tile(tiles, 4096, 4096) == tiles[0]
    assert _triton.default_tile(tiles, 64, 576).o == 64
    assert _triton.default_tile(tiles, 1, 9).o == 16


def test_triton_looks_at_the_arguments_of_a_launch_once_for_each_alignment():
    from unlearn_fast.ops import _triton

    looked, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    class Kernel:
        arg_names = ("out", "x", "scale", "n", "BLOCK", "ADD")

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                looked.append((grid, arguments, options))
                return Compiled()

            return launch

    memory = torch.zeros(40)
    out, x, shifted = memory[:4], memory[8:12], memory[9:13]
    launch = _triton.Launch(Kernel(), (7,), 4, ADD=True, BLOCK=16, num_warps=4)
    for operand in (x, shifted, None, x, shifted, None):
        launch((out, operand), 0.5)
    first, others = looked[0], looked[1:]
    assert first == ((7, 1, 1), (out, x, 0.5, 4), {"ADD": True, "BLOCK": 16, "num_warps": 4})
    assert [id(arguments[1]) for _, arguments, _ in others] == [id(shifted), id(None)]
    assert [id(arguments[1]) for _, arguments in launched] == [id(x), id(shifted), id(None)]
    assert launched[0] == ((7, 1, 1), (out, x, 0.5, 4, 16, True))  # constants in the kernel's order
