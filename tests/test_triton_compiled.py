"""The Triton kernels compiled ahead of time, without a GPU: no configuration that is shipped spills registers."""

import pytest

pytest.importorskip("triton")

from unlearn_fast.ops import resources


@pytest.mark.parametrize("operator", resources.OPERATORS)
@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("bfloat16", 80), ("bfloat16", 90), ("bfloat16", 100), ("float32, TF32", 80),
     ("float32, TF32", 90), ("float32, IEEE", 90), ("float64", 90)],
)  # fmt: skip
@pytest.mark.slow
def test_no_register_is_spilled(operator, kind, architecture):
    """The rest of the matrix: `python -m unlearn_fast.ops.resources`."""
    seen = 0
    for title, recorded in resources.shipped(operator, kind):
        found = resources.usage(resources.compiled(recorded, architecture))
        assert found.stack == 0, f"{title}: {found}"
        seen += 1
    assert seen
