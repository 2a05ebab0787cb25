"""What every operator keeps on a GPU: its declared shapes, its bits, whatever stream, graph, device or address it is
called with, and its inputs where there is no memory left. Accuracy is in test_gpu.py.
"""

import contextlib
from collections.abc import Iterator

import operator_calls
import operator_samples
import pytest
import torch
from accuracy import bits
from operator_calls import SYNCHRONIZING, calls, placed, run, tensors
from torch import Tensor

import unlearn_fast
from unlearn_fast import _library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16]
every_operator = pytest.mark.parametrize("name", _library.SCHEMAS)


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape and torch.equal(bits(a.cpu()), bits(b.cpu())), f"tensor {n} of {len(wanted)}"


def copies(arguments: tuple) -> tuple:
    return placed(arguments, DEVICE)


def test_every_operator_is_called():
    assert set(calls()) == set(_library.SCHEMAS)


@every_operator
def test_opcheck(name):
    for arguments in operator_samples.samples()[name]:
        torch.library.opcheck(getattr(torch.ops.unlearn_fast, name).default, placed(arguments, DEVICE))


@every_operator
def test_compiled(name):
    """Without a break of the graph, by torch's own compiler."""
    operator = getattr(torch.ops.unlearn_fast, name)
    if name == "dampen_record":
        pytest.skip("it returns as many values as it finds")
    arguments = placed(calls()[name], DEVICE)
    wanted = run(name, copies(arguments))
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: operator(*x), fullgraph=True, dynamic=False)
    returned = compiled(*arguments)
    assert_same_bits([*tensors(returned), *tensors(arguments)], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_operator
def test_the_same_bits_again_and_on_another_stream(name, dtype):
    arguments = placed(calls(dtype)[name], DEVICE)
    wanted = run(name, copies(arguments))
    assert_same_bits(run(name, copies(arguments)), wanted)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000)  # what ran on the other stream would be done before this
        found = run(name, copies(arguments))
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_operator
def test_a_graph_replays_on_changed_inputs(name, dtype):
    if name in SYNCHRONIZING:
        pytest.skip("it waits for the GPU, which no graph can")
    if name == "dampen_undo_":
        pytest.skip("its record must be that of its tensors")
    arguments = placed(calls(dtype)[name], DEVICE)
    changed = copies(arguments)
    for x in tensors(changed):
        if x.is_floating_point():
            x.copy_(x.flip(0))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(name, copies(arguments))  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, arguments)
    for x, new in zip(tensors(arguments), tensors(changed), strict=True):
        x.copy_(new)
    graph.replay()
    assert_same_bits(captured, run(name, changed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
@every_operator
def test_addresses_that_no_vector_fits(name, offset, dtype):
    """Sums may run in another order there; what is not summed keeps its bits."""
    wanted, found = (run(name, placed(calls(dtype)[name], DEVICE, k)) for k in (0, offset))
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
        if a.is_floating_point():
            size = b.abs().nan_to_num_(0, 0, 0).max() if b.numel() else 0
            torch.testing.assert_close(a, b, rtol=0, atol=float(8 * torch.finfo(b.dtype).eps * size), equal_nan=True)
        else:
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_operator
def test_on_another_device_than_the_current_one(name):
    here, there = (run(name, placed(calls()[name], f"cuda:{n}")) for n in (0, 1))
    assert torch.cuda.current_device() == 0
    assert_same_bits(there, here)


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """No allocation on the GPU succeeds: torch gets no more of it, and what it has is filled up."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    held = []
    try:
        for size in ((1 << 20) + 1, 1):  # of which torch keeps large and small ones apart
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


@every_operator
def test_without_memory_the_inputs_are_as_before(name):
    arguments = placed(calls(torch.bfloat16)[name], DEVICE)
    wanted = run(name, copies(arguments))
    before = [x.cpu() for x in tensors(arguments)]
    failed = False
    with no_memory():
        try:
            returned = getattr(torch.ops.unlearn_fast, name)(*arguments)
        except RuntimeError:  # torch.OutOfMemoryError is one
            failed = True
    torch.cuda.synchronize()
    if failed:
        assert_same_bits(tensors(arguments), before)
        assert_same_bits(run(name, arguments), wanted)
    else:  # it needed none
        assert_same_bits([*tensors(returned), *tensors(arguments)], wanted)


def leaf(*shape: int) -> Tensor:
    return operator_calls.randn(*shape, dtype=torch.float64).to(DEVICE).requires_grad_()


def test_gradcheck():
    labels = torch.tensor([2, -100, 0], device=DEVICE)
    options = {"softcap": 3.0, "temperature": 0.7}

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        found = unlearn_fast.token_statistics(x, labels, **options)
        return found.logp, found.entropy, found.lse

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return unlearn_fast.linear_token_logprobs(hidden, weight, labels, bias=bias, **options)

    teacher = leaf(3, 8).detach()
    assert torch.autograd.gradcheck(lambda x: unlearn_fast.token_logprobs(x, labels, **options), leaf(3, 7))
    assert torch.autograd.gradcheck(statistics, leaf(3, 7))
    assert torch.autograd.gradcheck(lambda x: unlearn_fast.token_kl(x, teacher, labels, **options), leaf(3, 8))
    assert torch.autograd.gradcheck(linear, (leaf(3, 4), leaf(7, 4), leaf(7)))


def test_importances_of_more_than_two_to_the_31_elements():
    """The squares of the last rows and columns are where they belong."""
    O, I = 33_000, 66_000  # noqa: E741
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of the GPU's memory")
    a, g = (operator_calls.randn(2, 16, n, dtype=torch.bfloat16).to(DEVICE) for n in (I, O))
    out = torch.zeros(O, I, device=DEVICE)
    unlearn_fast.sum_grad_squared_linear_(out, a, g)
    for place in (slice(0, 64), slice(-64, None)):
        exact = (g[..., place].double().mT @ a[..., place].double()).square().sum(0)
        torch.testing.assert_close(out[place, place].double(), exact, rtol=1e-5, atol=1e-5 * float(exact.max()))
    tokens = torch.tensor([[O - 1, 0], [O - 1, O - 1]], device=DEVICE)
    rows = a[:, :2]
    unlearn_fast.sum_grad_squared_embedding_(out.zero_(), tokens, rows)
    wide = rows.double()
    last = wide[0, 0].square() + (wide[1, 0] + wide[1, 1]).square()
    torch.testing.assert_close(out[-1].double(), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0].double(), wide[0, 1].square(), rtol=1e-5, atol=1e-5)
    assert not out[1:-1].any()
