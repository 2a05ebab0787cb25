"""token_logprobs and token_kl in Triton on a GPU: accuracy, the same bits twice, CUDA graphs, devices, long tensors."""

import pytest
import torch
from accuracy import bits
from torch import Tensor

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SETTINGS = {"plain": (0.0, 1.0), "softcap and temperature": (20.0, 0.7)}


def inputs(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a teacher's, and labels, of which the second is ignored."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, teacher = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels.view(-1)[1:2] = -100
    return x.to(device, dtype), teacher.to(device, dtype), labels.to(device)


def run(x: Tensor, teacher: Tensor, labels: Tensor, softcap: float, temperature: float, in_place: bool = False) -> list:
    """Every result of both operators and their gradients."""
    import unlearn_fast  # noqa: F401

    ops = torch.ops.unlearn_fast
    found = ops.token_logprobs(x, labels, -100, softcap, temperature, True)
    divergence = ops.token_kl(x, teacher, labels, -100, softcap, temperature, 2.0)
    grads = [torch.linspace(-1, 2, labels.numel(), device=x.device).view(labels.shape).to(found[0].dtype)] * 4
    ends = (-100, softcap, temperature)
    if in_place:
        dx, dy = x.clone(), x.clone()
        ops.token_logprobs_backward_(*grads, dx, labels, *found[:4], *ends)
        ops.token_kl_backward_(grads[0], dy, teacher, labels, *divergence[1:], *ends, 2.0)
    else:
        dx = ops.token_logprobs_backward(*grads, x, labels, *found[:4], *ends)
        dy = ops.token_kl_backward(grads[0], x, teacher, labels, *divergence[1:], *ends, 2.0)
    return [*found, *divergence, dx, dy]


def assert_near(results: list[Tensor], exact: list[Tensor]) -> None:
    for n, (result, wanted) in enumerate(zip(results, exact, strict=True)):
        wanted = wanted.cpu().double()
        error = ((result.cpu().double() - wanted).abs() / wanted.abs().amax(-1, keepdim=True).clamp(min=1)).max()
        assert error <= 32 * torch.finfo(result.dtype).eps, f"result {n}: error {error:.3g}"


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (5, 777), (2, 3, 50257), (1, 131072), (700, 4000)], ids=str)
def test_against_float64_and_twice_the_same(shape, dtype, settings):
    x, teacher, labels = inputs(*shape, dtype=dtype)
    results, again = (run(x, teacher, labels, *SETTINGS[settings]) for _ in range(2))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, again, strict=True))
    placed = run(x, teacher, labels, *SETTINGS[settings], in_place=True)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, placed, strict=True))
    exact = run(x.double().cpu(), teacher.double().cpu(), labels.cpu(), *SETTINGS[settings])
    assert_near(results, exact)


@pytest.mark.parametrize("lead", [5.0, 20.0, 80.0])
def test_confident_rows_keep_their_precision(lead):
    x, teacher, labels = inputs(6, 5000)
    labels[1] = 3
    x.scatter_(1, labels.unsqueeze(1), x.amax(1, keepdim=True) + lead)
    logp = run(x, teacher, labels, 0.0, 1.0)[0]
    exact = run(x.double().cpu(), teacher.double().cpu(), labels.cpu(), 0.0, 1.0)[0]
    assert ((logp.cpu().double() - exact) / exact).abs().max() <= 8 * torch.finfo(torch.float32).eps


def test_rows_of_a_view_and_a_label_out_of_range():
    x, teacher, labels = inputs(3, 4, 50257, dtype=torch.bfloat16)
    whole = run(x[:, :-1].contiguous(), teacher[:, :-1].contiguous(), labels[:, :-1].contiguous(), 0.0, 1.0)
    views = run(x[:, :-1], teacher[:, :-1], labels[:, :-1], 0.0, 1.0)
    assert_near(views, whole)
    labels[0, 0] = 50257
    for result, before in zip(run(x[:, :-1], teacher[:, :-1], labels[:, :-1], 0.0, 1.0), whole, strict=True):
        assert torch.equal(result[1:].isnan(), before[1:].isnan())


@pytest.mark.parametrize("shape", [(600, 32000), (2, 32000)], ids=["whole rows", "split rows"])
def test_in_a_cuda_graph(shape):
    x, teacher, labels = inputs(*shape, dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(x, teacher, labels, 0.0, 1.0, in_place=True)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, teacher, labels, 0.0, 1.0, in_place=True)
    x.copy_(x.flip(0))
    graph.replay()
    again = run(x, teacher, labels, 0.0, 1.0, in_place=True)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(captured, again, strict=True))


def test_nothing_waits_for_the_gpu():
    x, teacher, labels = inputs(4, 32000)
    run(x, teacher, labels, 0.0, 1.0)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, teacher, labels, 0.0, 1.0)
        run(x, teacher, labels, 0.0, 1.0, in_place=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device_than_the_current_one():
    here, there = (run(*inputs(5, 3000, device=f"cuda:{n}"), 0.0, 1.0) for n in (0, 1))
    assert torch.cuda.current_device() == 0
    assert all(
        b.device.index == 1 and torch.equal(bits(a.cpu()), bits(b.cpu())) for a, b in zip(here, there, strict=True)
    )


def test_more_than_two_to_the_31_elements():
    """The last rows lie beyond what 32 bits address; they are equal to the first."""
    N, V = 8200, 262144
    if torch.cuda.mem_get_info()[0] < 3 * N * V * 2:
        pytest.skip("needs 12 GiB of the GPU's memory")
    import unlearn_fast  # noqa: F401

    ops = torch.ops.unlearn_fast
    x = torch.empty(N, V, dtype=torch.bfloat16, device="cuda")
    rows = torch.randn(8, V, device="cuda").bfloat16()
    x.view(-1, 8, V).copy_(rows.expand(N // 8, 8, V))
    labels = torch.arange(8, device="cuda").repeat(N // 8) * 30000
    found = ops.token_logprobs(x, labels, -100, 0.0, 1.0, True)
    assert all(torch.equal(bits(r[:8]), bits(r[-8:])) for r in found)
    torch.testing.assert_close(
        found[0][-8:], rows.double().log_softmax(-1).gather(1, labels[:8].unsqueeze(1)).squeeze(1).float()
    )
    ops.token_logprobs_backward_(torch.ones_like(found[0]), None, None, None, x, labels, *found[:4], -100, 0.0, 1.0)
    assert torch.equal(bits(x[:8]), bits(x[-8:])) and x[-8:].isfinite().all() and x[-8:].any(1).all()
