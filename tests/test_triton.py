"""The Triton kernels in Triton's interpreter, each operator in a process of its own: see interpreted.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn_fast import _library

pytest.importorskip("triton")

TESTS = Path(__file__).parent


@pytest.mark.parametrize("operator", ["linear", "conv", "embedding", "scale"])
def test_interpreted(operator):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        TESTS / f"interpreted_{operator}.py",
    ]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=600)
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
