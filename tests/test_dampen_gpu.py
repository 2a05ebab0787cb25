"""dampen_ in CUDA C++: the CPU kernel's bits, alignments, lists of tensors, CUDA graphs, large tensors."""

import itertools

import pytest
import torch
from torch import Tensor

import unlearn_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SETTINGS = {"alpha": 2.0, "lam": 0.7, "exponent": 1.0, "cap": 0.9}


def triple(n: int, params: torch.dtype, importances: torch.dtype, seed: int = 0) -> list[Tensor]:
    """p, f and r on the CPU, with a few hostile values; about a third is selected."""
    generator = torch.Generator().manual_seed(seed + n)
    r = torch.rand(n, generator=generator) + 0.1
    f = r * 3 * torch.rand(n, generator=generator)
    p = torch.randn(n, generator=generator)
    for place, value in enumerate((0.0, float("nan"), float("inf"), 1e-42)):
        if n > 20:
            f[place], r[place + 4], p[place + 8] = value, value, value
    return [p.to(params), f.to(importances), r.to(importances)]


def run(triples: list[list[Tensor]], device: str, **settings: float) -> tuple[list[Tensor], Tensor]:
    moved = [[t.to(device, copy=True) for t in x] for x in triples]
    params, forget, reference = (list(x) for x in zip(*moved, strict=True))
    table = torch.ops.unlearn_fast.dampen_(params, forget, reference, *(SETTINGS | settings).values())
    return [p.cpu() for p in params], table.cpu()


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, but that a NaN is a NaN."""
    nan = a.isnan()
    clean = [x.cpu().masked_fill(nan.cpu(), 0).view(torch.uint8) for x in (a, b)]
    return torch.equal(nan.cpu(), b.isnan().cpu()) and torch.equal(*clean)


def assert_same(triples: list[list[Tensor]], **settings: float) -> None:
    found, expected = run(triples, "cuda", **settings), run(triples, "cpu", **settings)
    for ours, wanted in zip(found[0], expected[0], strict=True):
        assert same(ours, wanted)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("params", DTYPES, ids=str)
@pytest.mark.parametrize("importances", DTYPES, ids=str)
def test_the_cpu_kernels_bits(params, importances):
    assert_same([triple(n, params, importances) for n in (1, 7, 4099, 200_003)])


@pytest.mark.parametrize("exponent", [0.5, 2.0, 3.0])
def test_exponents(exponent):
    assert_same([triple(5001, dtype, torch.float32) for dtype in DTYPES], exponent=exponent)


def test_more_tensors_than_a_launch_takes_of_several_dtypes():
    sizes = [(n * 37) % 301 for n in range(1700)]  # a few of them empty
    assert_same([triple(n, DTYPES[k % 3], DTYPES[k % 4], seed=k) for k, n in enumerate(sizes)])


def test_importances_of_two_dtypes():
    p, f, r = triple(4097, torch.bfloat16, torch.float32)
    assert_same([[p, f.bfloat16(), r], [p.clone(), f, r.double()]])


@pytest.mark.parametrize("offsets", itertools.product((0, 1, 4), repeat=3), ids=str)
def test_alignments(offsets):
    """Views that begin anywhere; what lies around them is untouched."""
    whole = [x.cuda() for x in triple(70_000, torch.float32, torch.float32)]
    views = [x[k : k + 66_001] for x, k in zip(whole, offsets, strict=True)]
    expected = [x.cpu() for x in views]
    before = whole[0].clone()
    unlearn_fast.dampen_([views[0]], [views[1]], [views[2]], alpha=2.0)
    unlearn_fast.dampen_([expected[0]], [expected[1]], [expected[2]], alpha=2.0)
    assert same(views[0], expected[0])
    outside = torch.ones(len(before), dtype=torch.bool, device="cuda")
    outside[offsets[0] : offsets[0] + 66_001] = False
    assert same(before[outside], whole[0][outside])


def test_strides_of_the_parameter():
    p, f, r = (x.view(50, 100) for x in triple(5000, torch.float32, torch.float32))
    ours = p.t().contiguous().cuda().t()
    unlearn_fast.dampen_([ours], [f.cuda()], [r.cuda()], alpha=2.0)
    unlearn_fast.dampen_([p], [f], [r], alpha=2.0)
    assert same(ours.contiguous(), p)


def test_twice_the_same_bits_on_another_stream():
    triples = [triple(n, torch.float32, torch.float32) for n in (300_000, 17)]
    first = run(triples, "cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        second = run(triples, "cuda")
    assert torch.equal(first[1], second[1])
    assert all(same(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_in_a_cuda_graph():
    triples = [[x.cuda() for x in triple(n, torch.bfloat16, torch.float32)] for n in (5000, 40)]
    params, forget, reference = (list(x) for x in zip(*triples, strict=True))
    start = [p.clone() for p in params]

    def restore() -> None:
        for p, s in zip(params, start, strict=True):
            p.copy_(s)

    once = torch.ops.unlearn_fast.dampen_(params, forget, reference, *SETTINGS.values())
    wanted = [p.clone() for p in params]
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait would fail the capture
        table = torch.ops.unlearn_fast.dampen_(params, forget, reference, *SETTINGS.values())
    restore()
    graph.replay()
    assert torch.equal(table, once)
    assert all(same(a, b) for a, b in zip(params, wanted, strict=True))


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip("needs 20 GiB of the GPU's memory")
    p = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    f = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    r = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    f[-3000:] = 4
    report = unlearn_fast.dampen_([p], [f], [r], alpha=2.0)
    assert report.total.selected == 3000
    assert (p[-3000:] == 0.25).all() and (p[:-3000] == 1).all()
