"""The sweep of the kernels' configurations, in the interpreter: all of them serve, with the same results."""

import importlib
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import interpreted  # noqa: F401
import pytest
import torch

tune = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "gpu_tune.py"))
tune["sweep"].__globals__["ROUNDS"] = 1
SHORT = {name: (module, names, choices[:3]) for name, (module, names, choices) in tune["SHORT_LISTS"].items()}
tune["SHORT_LISTS"].update(SHORT)  # the interpreter takes its time
CLOCK = SimpleNamespace(empty_caches=lambda: None, seconds=lambda run, inputs: float(len(run(inputs))))


@pytest.fixture(scope="module", autouse=True)
def served_by_triton() -> Iterator[None]:
    """The operators' CPU kernels make way."""
    from unlearn_fast import _library

    with torch.library._scoped_library("unlearn_fast", "IMPL") as library:
        for name in _library.TRITON:
            folder = name.rstrip("_").removesuffix("_backward")
            launcher = getattr(importlib.import_module(f"unlearn_fast.ops.{folder}.triton"), name)
            library.impl(name, launcher, "CPU", allow_override=True)
        yield


JOBS = {job.kernel: job for job in tune["jobs"]("cpu") if "softcap" not in job.kernel}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_every_configuration_serves(job):
    row = tune["sweep"](job, CLOCK)
    assert not [c for c in row["configurations"] if c["failure"] or c["ms"] is None]
    titles = [c["configuration"] for c in row["configurations"]]
    assert len(titles) == len(set(titles)) > 1 and {row["best"], row["shipped"]} <= set(titles)
