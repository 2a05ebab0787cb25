"""dampen_ in CUDA C++: the CPU kernel's bits, alignments, lists of tensors, CUDA graphs, large tensors; and what goes
with it, in plain torch there: importances that stay on the CPU, undo, percentiles, curves, masks.
"""

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
SETTINGS = {"exponent": 1.0, "cap": 0.9, "floor": 0.05}


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


def dampen(params: list[Tensor], forget: list[Tensor], reference: list[Tensor], **settings: float) -> Tensor:
    """With an alpha and a lam for each."""
    alphas, lams = ([start + 0.1 * (i % 5) for i in range(len(params))] for start in (1.8, 0.7))
    return torch.ops.unlearn_fast.dampen_(params, forget, reference, alphas, lams, *(SETTINGS | settings).values())


def run(triples: list[list[Tensor]], device: str, **settings: float) -> tuple[list[Tensor], Tensor]:
    moved = [[t.to(device, copy=True) for t in x] for x in triples]
    params, forget, reference = (list(x) for x in zip(*moved, strict=True))
    table = dampen(params, forget, reference, **settings)
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

    once = dampen(params, forget, reference)
    wanted = [p.clone() for p in params]
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait would fail the capture
        table = dampen(params, forget, reference)
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


# In plain torch on the GPU


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("importances", [torch.float32, torch.bfloat16], ids=str)
def test_importances_that_stay_on_the_cpu(pinned, importances, monkeypatch):
    """They pass through in pieces, of which there are several here, with parts of tensors in them."""
    monkeypatch.setattr("unlearn_fast.ops.dampen.stream.PIECE", 10_000)
    triples = [triple(n, torch.bfloat16, importances, seed=n) for n in (35_001, 7, 0, 4096, 20_000)]
    expected = [p.clone() for p, _, _ in triples]
    forget, reference = ([x[i].pin_memory() if pinned else x[i] for x in triples] for i in (1, 2))
    wanted = unlearn_fast.dampen_(expected, forget, reference, alpha=2.0)
    params = [p.cuda() for p, _, _ in triples]
    found = unlearn_fast.dampen_(params, forget, reference, alpha=2.0)
    assert all(same(p, e) for p, e in zip(params, expected, strict=True))
    torch.testing.assert_close(found.stats.cpu(), wanted.stats, rtol=1e-12, atol=0)


def test_undo():
    triples = [
        [x.cuda() for x in triple(n, dtype, torch.float32)]
        for n, dtype in zip((70_001, 5, 300, 0), DTYPES, strict=True)
    ]
    params, forget, reference = (list(x) for x in zip(*triples, strict=True))
    before = [p.clone() for p in params]
    report = unlearn_fast.dampen_(params, forget, reference, alpha=2.0, undo=True)
    assert report.total.selected == report.undo.changed > 0
    unlearn_fast.undo_(report.undo)
    assert all(same(p, b) for p, b in zip(params, before, strict=True))


def test_the_cpus_percentiles_curves_and_masks():
    _, f, r = zip(*(triple(n, torch.float32, torch.float32) for n in (70_001, 5, 300)), strict=True)
    on_gpu = [[x.cuda() for x in side] for side in (f, r)]
    q = [0.0, 12.5, 99.9, 100.0]
    assert unlearn_fast.alpha_for_percentile(*on_gpu, q) == unlearn_fast.alpha_for_percentile(f, r, q)
    curves = [unlearn_fast.selection_curve(*pair, [0.0, 0.5, 2.0]).counts for pair in (on_gpu, (f, r))]
    assert torch.equal(*curves)
    scores = [x.nan_to_num(0.0) for x in f]
    masks = unlearn_fast.top_fraction_mask([x.cuda() for x in scores], 0.3)
    expected = unlearn_fast.top_fraction_mask(scores, 0.3)
    assert all(torch.equal(m.cpu(), e) for m, e in zip(masks, expected, strict=True))
