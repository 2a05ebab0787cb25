"""Settings of all tests."""

from collections.abc import Iterator

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
def checks(monkeypatch):
    """How many batches the Fisher's fast pass was checked on."""
    made = []
    check = PerExample._check

    def counted(self, *arguments):
        made.append(1)
        return check(self, *arguments)

    monkeypatch.setattr(PerExample, "_check", counted)
    return made
