"""The Triton kernels on a GPU: the same bits twice, CUDA graphs, devices, and tiles that are measured."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def calls(dtype: torch.dtype) -> dict[str, tuple]:
    """Operator -> arguments: out, what it reads, and settings; on the CPU."""
    wide = torch.promote_types(dtype, torch.float32)
    weights, tail = randn(6, dtype=wide), (0.5, False)

    def arguments(shape: tuple[int, ...], *read: object) -> tuple:
        return torch.zeros(shape, dtype=wide), *read, weights, torch.zeros(shape, dtype=wide), *tail

    a, g = randn(6, 70, 130, dtype=dtype), randn(6, 70, 65, dtype=dtype)
    x, y = randn(6, 1, 24, 9, 8, dtype=dtype), randn(6, 1, 40, 9, 8, dtype=dtype)
    tokens = torch.randint(-1, 50, (6, 70), generator=torch.Generator().manual_seed(0))
    return {
        "sum_grad_squared_linear_": arguments((65, 130), a, g),
        "sum_grad_squared_conv_": arguments((40, 24, 3, 3), x, y, [1, 1], [1, 1], [1, 1], 1),
        "sum_grad_squared_embedding_": arguments((50, 65), tokens, g),
        "sum_grad_squared_scale_": arguments((65,), g, g),
    }


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
@pytest.mark.parametrize("name", calls(torch.float32))
def test_against_float64_and_twice_the_same(name, dtype):
    import unlearn_fast

    assert unlearn_fast._library.implementation(name, "cuda") == "triton"
    arguments = calls(dtype)[name]
    results, again = run(name, arguments, "cuda"), run(name, arguments, "cuda")
    for result, repeated, exact in zip(results, again, run(name, arguments, "cpu"), strict=True):
        assert_near(result, exact)
        assert torch.equal(result, repeated)


@pytest.mark.parametrize("name", calls(torch.float32))
def test_in_a_cuda_graph(name):
    import unlearn_fast  # noqa: F401

    arguments = [a.cuda() if isinstance(a, Tensor) else a for a in calls(torch.bfloat16)[name]]
    operator = getattr(torch.ops.unlearn_fast, name)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        operator(*arguments)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    once = arguments[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operator(*arguments)
    arguments[0].zero_()
    graph.replay()
    assert torch.equal(arguments[0], once)


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device_than_the_current_one():
    import unlearn_fast  # noqa: F401

    arguments = calls(torch.float32)["sum_grad_squared_linear_"]
    result = run("sum_grad_squared_linear_", arguments, "cuda:1")[0]
    assert_near(result, run("sum_grad_squared_linear_", arguments, "cpu")[0])
