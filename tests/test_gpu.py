"""Every operator's check of `unlearn_fast verify`, on the GPU."""

import pytest
import torch

from unlearn_fast import verify
from unlearn_fast.scenarios import scenarios

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("operator", dict.fromkeys(scenario.operator for scenario in scenarios()))
def test_as_accurate_as_on_the_cpu(operator):
    checks = list(verify.run_checks(["cuda"], operator))
    assert checks
    assert not [check for check in checks if not check.passed]


def test_dampening_is_served_by_the_cuda_kernel():
    from unlearn_fast import _library

    assert _library.implementation("dampen_", "cuda") == "cuda", _library.missing
