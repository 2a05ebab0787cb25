"""The Triton kernels of sums on a GPU: accuracy, the same bits twice, and tiles that are measured."""

import pytest
import torch
from operator_calls import of_sums, randn
from torch import Tensor

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(name: str, arguments: tuple, device: str) -> tuple[Tensor, Tensor]:
    """out and first; the CPU's are computed from the same values in float64."""
    moved = [a.to(device, copy=True) if isinstance(a, Tensor) else a for a in arguments]
    if device == "cpu":
        moved = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in moved]
    getattr(torch.ops.unlearn_fast, name)(*moved)
    return moved[0], moved[-3]


def assert_near(result: Tensor, exact: Tensor) -> None:
    error = (result.cpu().double() - exact).abs().max() / exact.abs().max()
    assert error <= 1e-5, f"relative error {error:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", of_sums(torch.float32))
def test_against_float64_and_twice_the_same(name, dtype):
    import unlearn_fast

    assert unlearn_fast._library.implementation(name, "cuda") == "triton"
    arguments = of_sums(dtype)[name]
    results, again = run(name, arguments, "cuda"), run(name, arguments, "cuda")
    for result, repeated, exact in zip(results, again, run(name, arguments, "cpu"), strict=True):
        assert_near(result, exact)
        assert torch.equal(result, repeated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.3, float("nan")])
def test_scaling_in_place(dtype, factor):
    from unlearn_fast.ops import _triton

    x, by = randn(3_000_001, dtype=dtype).cuda(), torch.tensor(factor, device="cuda")
    expected = (x.to(torch.promote_types(dtype, torch.float32)) * by).to(dtype)  # x * by would round the factor first
    _triton.scale_(x, by)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("first", [False, True])
def test_measured_tiles(first):
    """Large enough to be measured, which must leave no trace in the sums."""
    import unlearn_fast  # noqa: F401

    a, g = randn(8, 512, 512, dtype=torch.bfloat16).cuda(), randn(8, 512, 768, dtype=torch.bfloat16).cuda()
    out = torch.zeros(768, 512, device="cuda")
    mean = torch.zeros_like(out) if first else None
    torch.ops.unlearn_fast.sum_grad_squared_linear_(out, a, g, None, mean, 1.0, False)
    gradients = g.double().transpose(1, 2) @ a.double()
    assert_near(out, gradients.square().sum(0).cpu())
    if mean is not None:
        assert_near(mean, gradients.sum(0).cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("B", "T", "O", "I"), [(5, 200, 136, 264), (1, 64, 128, 256), (3, 1000, 520, 72)], ids=str)
def test_every_tile_by_boxes(dtype, first, B, T, O, I):  # noqa: E741
    """What the copy engine loads, where there is one; of a view whose rows lie apart, too."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    from unlearn_fast.ops import _triton
    from unlearn_fast.ops.sum_grad_squared_linear import triton as linear

    a, g = randn(B, T + 3, I + 8, dtype=dtype).cuda(), randn(B, T, O, dtype=dtype).cuda()
    a = a[:, :T, :I]
    exact = g.double().transpose(1, 2) @ a.double()
    sums = [torch.zeros(O, I, device="cuda"), torch.zeros(O, I, device="cuda") if first else None]
    layouts = _triton.layouts(*sums, a, g, None)
    call = linear.Call(*layouts, False, "ieee", a.device, _triton.processors(a), by_boxes=True)
    for tile in call.tiles:
        out, mean = (None if x is None else torch.zeros_like(x) for x in sums)
        call.launch(tile, [out, mean], call.operands(a, g, None), 1.0)
        assert_near(out, exact.square().sum(0).cpu())
        if mean is not None:
            assert_near(mean, exact.sum(0).cpu())
