"""Settings of all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic
from hypothesis import HealthCheck, settings

from unlearn_fast.fisher.per_example import PerExample

settings.register_profile(
    "reproducible",
    deadline=None,  # machines differ, and the first call may compile
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("reproducible")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that a result that a kernel leaves unwritten shows."""
    memory = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    memory.fill_uninitialized_memory = before[1]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model directory of transformers."""
    from model_directories import save

    return save("llama", tmp_path / "model")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The options that name files of rows to forget and to retain."""
    from model_directories import write_sets

    return write_sets(tmp_path)


@pytest.fixture
def case() -> Iterator[tuple]:
    """A model and its importances, for what must leave its parameters with the bits that they had."""
    from importances import clones, mixed_model, of_model, same

    model = mixed_model()
    before = clones(list(model.parameters()))
    yield model, *of_model(model)
    assert same(list(model.parameters()), before)


@pytest.fixture
def checks(monkeypatch):
    """How many batches the Fisher's fast pass was checked on."""
    made = []
    check = PerExample._check

    def counted(self, *arguments):
        made.append(1)
        return check(self, *arguments)

    monkeypatch.setattr(PerExample, "_check", counted)
    return made
