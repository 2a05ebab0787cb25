"""The CUDA C++ kernels as they were built, for every architecture: registers and stack, without a GPU."""

import pytest

from unlearn_fast import _library
from unlearn_fast.ops import resources

MOST_REGISTERS = 128  # 2 blocks of 256 threads a multiprocessor, and more where a kernel needs fewer

pytestmark = pytest.mark.skipif(not resources.LIBRARY.exists(), reason="the CUDA part is not built")


def test_no_register_is_spilled():
    try:
        found = resources.resource_usage(resources.LIBRARY)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    built = {int(a) for a in _library.native.build_info()["cuda_architectures"].split() if a.isdigit()}
    assert {architecture for _, architecture, _ in found} == built or not built
    kernels = [row for row in found if "dampen_kernel" in row[0]]
    assert len(kernels) == 32 * len({architecture for _, architecture, _ in found})  # 4 x 4 dtypes, exponent 1 or other
    for name, architecture, usage in found:
        assert usage.stack == 0, f"{name} on sm_{architecture}: {usage}"
        assert usage.registers <= MOST_REGISTERS, f"{name} on sm_{architecture}: {usage}"
