"""The Triton kernels compiled ahead of time, without a GPU: no configuration that is shipped spills registers, and rows
of logits are read by whole vectors, ahead of their use.
"""

import re

import pytest

pytest.importorskip("triton")

from unlearn_fast.ops import resources

# Bytes a thread, in sums that are touched once an example: fewer than the blocks of its example.
SPILLED = {"examples, 128 x 256 x 64, 8 warps, 3 stages, boxes": 192}


@pytest.mark.parametrize("operator", resources.OPERATORS)
@pytest.mark.parametrize(("kind", "architecture"), resources.CHECKED)
@pytest.mark.slow
def test_no_register_is_spilled(operator, kind, architecture):
    seen = 0
    for title, recorded in resources.shipped(operator, kind):
        if not recorded.serves(architecture):
            continue
        kernel = resources.compiled(recorded, architecture)
        found = resources.usage(kernel)
        assert found.stack <= SPILLED.get(title, 0), f"{title}: {found}"
        stages = recorded.options.get("num_stages", recorded.options.get("STAGES", 0))
        if recorded.options.get("BOXES"):
            assert kernel.asm["ttgir"].count("async_tma_copy_global_to_local") > 2, title
        elif stages > 2 and recorded.options.get("TOGETHER", True):
            assert loads_in_flight(kernel) > 0, title
        if "ALIGNED" in recorded.options:
            check_vectors(kernel, recorded.options)
        seen += 1
    assert seen


def loads_in_flight(kernel) -> int:
    """How many asynchronous copies the main loop leaves unfinished: 0 where it waits for what it has just asked for."""
    code = kernel.asm["ttgir"]
    loop = code[code.index("scf.for") :]
    return int(re.findall(r"async_wait.*?num = (\d+)", loop)[0])


def check_vectors(kernel, options) -> None:
    """Full blocks of rows are read and written by whole vectors, wherever a row begins, and their maxima and sums stay
    within threads.
    """
    code = kernel.asm["ptx"]
    if options.get("TOGETHER", True):
        assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10,", code)  # 16 bytes
    if "backward" in kernel.name:
        assert re.search(r"st\.global\.v[24]\.b(32|64)", code)
    assert code.count("shfl.sync") < 100  # at a row's end
