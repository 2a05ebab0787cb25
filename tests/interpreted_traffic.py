"""What the Triton kernels move and compute, counted in the interpreter, against stated limits."""

import functools
import json
import math
from pathlib import Path

import interpreted  # noqa: F401 (before triton is imported)
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from unlearn_fast.ops import traffic
from unlearn_fast.ops._triton import default_tile
from unlearn_fast.ops._triton_rows import as_rows, walk
from unlearn_fast.ops.sum_grad_squared_conv.triton import TILES
from unlearn_fast.ops.token_kl import triton as token_kl
from unlearn_fast.ops.token_logprobs import triton as token_logprobs

CASES = {f"{case.operator} {case.title}": case for case in traffic.cases()}
counted = functools.cache(lambda name: CASES[name].run())


def of(*operators: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.operator in operators])


def everywhere(counts: Tensor, times: int) -> bool:
    return bool((counts == times).all())


# -- the counter -------------------------------------------------------------------------------------------------------


@triton.jit
def small_kernel(x, y, box, n):
    place = tl.arange(0, 8)
    value = tl.load(x + place, mask=place < n, other=0) + tl.load(x + place, mask=place < n - 1, other=0)
    tl.store(y + place, tl.exp(value), mask=place < n)
    block = box.load([8, 8])
    total = tl.sum(tl.sum(tl.dot(block, block, input_precision="ieee"), 1), 0)
    tl.store(y + tl.arange(0, 256), total + tl.zeros([256], tl.float32))


def test_what_is_counted():
    x, y, z = torch.zeros(10), torch.zeros(300), torch.zeros(20, 20)
    with traffic.counting() as found:
        small_kernel[(2,)](x, y, TensorDescriptor(z, list(z.shape), list(z.stride()), [16, 16]), 5)
    assert found.loads.of(x).tolist() == [4] * 4 + [2] + [0] * 5
    assert everywhere(found.loads.of(z)[8:, 8:], 2) and not found.loads.of(z)[:8].any()
    assert found.stores.of(y).tolist() == [4] * 5 + [2] * 251 + [0] * 44 and not found.stores.of(x).any()
    assert found.loads.bytes == 2 * 4 * (5 + 4 + 12 * 12) and found.loads.distinct() == 4 * (5 + 12 * 12)
    assert found.stores.bytes == 2 * 4 * (5 + 256) and found.footprint == 4 * (5 + 12 * 12 + 256)
    assert found.products == 2 * 2 * 16**3 and found.exponentials == 2 * 8
    assert found.elementwise == 2 * (8 + 16 * 15 + 15 + 256)
    assert found.work == (2 * 4 * (5 + 4 + 144 + 5 + 256), found.products + found.elementwise, 16)


@triton.jit
def atomic_kernel(x):
    tl.atomic_add(x, 1.0)


def test_what_cannot_be_counted_is_refused_and_the_interpreter_is_left_as_it_was():
    x = torch.zeros(1)
    with pytest.raises(Exception, match="create_atomic_rmw is not counted"), traffic.counting() as found:
        atomic_kernel[(1,)](x)
    atomic_kernel[(1,)](x)
    assert not found.loads.bytes and not found.loads.distinct() and not found.loads.of(x)


# -- floors ------------------------------------------------------------------------------------------------------------


def test_floors_of_large_calls():
    N, V = 8192, 128_256
    rows = functools.partial(traffic.at_least, dtype=torch.bfloat16, N=N, V=V)
    assert rows("token_logprobs", K=N) == (2 * N * V + 20 * N, 2 * N * V, N * V)
    assert rows("token_logprobs_backward_", K=100).bytes == 2 * (100 + N) * V + 8 * N + 16 * 100
    assert rows("token_kl", K=N, t=4, c=2) == (6 * N * V + 28 * N, 7 * N * V, 4 * N * V)
    B, T, O, I = 64, 1024, 4096, 4096  # noqa: E741
    linear = traffic.at_least("linear", torch.bfloat16, B=B, T=T, O=O, I=I)
    assert linear.bytes == 2 * B * T * (O + I) + 8 * O * I
    assert 0 <= linear.flops / (2 * B * T * O * I) - 1 < 1e-2


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_below_its_floor(name):
    found, _ = counted(name)
    assert all(count >= floor for count, floor in zip(found.work, CASES[name].floors(), strict=True))
    assert CASES[name].floors().bytes <= found.footprint <= found.work.bytes


# -- rows of logits ----------------------------------------------------------------------------------------------------

ROWS = [operator for operator in traffic.FLOORS if operator.startswith("token")]
RESULTS = {"token_logprobs": 3, "token_logprobs, statistics": 6, "token_kl": 5}  # of a row, in float32
PARTIAL = {"token_logprobs": 2, "token_logprobs, statistics": 4, "token_kl": 5}  # sums of a part of a row
SAVED = {"token_logprobs_backward": 4, "token_logprobs_backward, statistics": 8, "token_kl_backward": 5}


def way_of(case: traffic.Case) -> tuple[int, int, int, int]:
    """Parts, blocks, lanes and places of a block, for one row."""
    x, teacher = case.tensors["logits"], case.tensors["teacher"]
    tensors = [x, *([x] if "backward" in case.operator else []), *([teacher] if "kl" in case.operator else [])]
    pace = token_kl.PACE if "kl" in case.operator else token_logprobs.PACE
    if case.operator == "token_kl" and case.sizes["c"] == 2:
        pace = pace._replace(vectors=1)
    way = walk(pace, *as_rows(*tensors))
    n = way.constants
    block = n["LANES"] * n["VECTOR"] * n["UNROLL"]
    return way.parts, math.ceil(x.shape[-1] / block), n["LANES"], block


@of(*ROWS)
def test_each_logit_is_loaded_once_and_none_of_ignored_rows(name):
    case, (found, result) = CASES[name], counted(name)
    x, labels = case.tensors["logits"], case.tensors["labels"]
    expected = (labels >= 0).long().unsqueeze(-1).expand(x.shape).clone()
    if "kl" in name:
        assert torch.equal(found.loads.of(case.tensors["teacher"]), expected)
    elif "backward" not in name:  # the label's own logit once more, at the end
        expected.scatter_add_(-1, labels.clamp(min=0).unsqueeze(-1), (labels >= 0).long().unsqueeze(-1))
    assert torch.equal(found.loads.of(x), expected)
    assert everywhere(found.stores.of(x), int(case.operator.endswith("_")))
    if "backward" in name and result is not None:  # zeros in ignored rows
        assert everywhere(found.stores.of(result), 1) and not found.loads.of(result).any()


@of(*ROWS)
def test_bytes_of_rows(name, monkeypatch):
    """Not one beyond the stated ones."""
    case, (found, _) = CASES[name], counted(name)
    monkeypatch.setattr("unlearn_fast.ops._triton.INTERPRETED_PROCESSORS", case.processors)
    parts, *_ = way_of(case)
    assert (parts > 1) == ("parts" in name or "[2, 3" in name)
    N, K, V, e = case.sizes["N"], case.sizes["K"], case.sizes["V"], case.dtype.itemsize
    logits = (e + 4 * ("kl" in name)) * K * V
    if "backward" in name:  # every part of a row reads the row's scalars
        expected = logits + e * N * V + (8 + 4 * SAVED[case.operator.replace("backward_", "backward")]) * N * parts
    else:
        expected = logits + e * K * ("logprobs" in name) + 8 * N * parts + 4 * RESULTS[case.operator] * N
        if parts > 1:  # written, and read by a second kernel, as the labels are
            expected += 2 * 4 * PARTIAL[case.operator] * N * parts + 8 * N
    assert found.work.bytes == expected
    assert found.work.bytes <= 1.06 * case.floors().bytes


@of(*ROWS)
def test_exponentials_of_rows(name, monkeypatch):
    """One a logit of whole blocks; in the forward, one a block in each lane, and a few more where a row ends."""
    case, (found, _) = CASES[name], counted(name)
    monkeypatch.setattr("unlearn_fast.ops._triton.INTERPRETED_PROCESSORS", case.processors)
    parts, blocks, lanes, block = way_of(case)
    N, each = case.sizes["N"], 2 if "kl" in name else 1
    most = each * case.sizes["c"] * N * blocks * block
    if "backward" not in name:
        most += each * N * (blocks + 2 * parts) * lanes
    assert found.exponentials <= most + 16 * N


FLOPS = {  # a logit in whole blocks of 16 bits, at most
    "token_logprobs": 4,
    "token_logprobs, statistics": 7,
    "token_logprobs_backward": 9.1,
    "token_logprobs_backward_": 9.1,
    "token_logprobs_backward, statistics": 14.1,
    "token_kl": 15,
    "token_kl_backward": 12.1,
    "token_kl_backward_": 12.1,
}


@pytest.mark.parametrize("operator", ROWS)
def test_flops_of_rows(operator):
    found, _ = counted(f"{operator} [8, 4096]")
    assert found.work.flops <= FLOPS[operator] * 8 * 4096 and not found.products


# -- sums of squared gradients -----------------------------------------------------------------------------------------


def added(case: traffic.Case, elements: int, parts: int) -> int:
    """Bytes of out: read and written; before that, those of each part of a split sum."""
    wide = torch.promote_types(case.dtype, torch.float32).itemsize
    return wide * elements * (2 + 2 * parts * (parts > 1)) * case.sizes.get("m", 1)


@of("linear", "linear, T = 1")
def test_linear(name):
    case, (found, _) = CASES[name], counted(name)
    B, T, I, O = (case.sizes[n] for n in "BTIO")  # noqa: E741
    q, m, e = case.sizes.get("q", 0), case.sizes.get("m", 1), case.dtype.itemsize
    call = case.launch.func
    tile, (launches,) = call.default, call.launches.values()
    parts = launches.sums.grid[1]
    assert (parts > 1) == ("parts" in name)
    across, down = math.ceil(I / tile.i), math.ceil(O / tile.o)
    assert everywhere(found.loads.of(case.tensors["a"]), down) and everywhere(found.loads.of(case.tensors["g"]), across)
    expected = e * B * T * (O * across + I * down) + 4 * q * B * across * down + added(case, O * I, parts)
    if T == 1:  # the magnitudes, before and after
        expected += 2 * 4 * parts * (O * across + I * down)
    assert found.work.bytes == expected
    if T > 1:
        step = max(16, min(tile.t, triton.next_power_of_2(T)))
        steps = B * math.ceil(T / step)
    else:
        step, examples = tile.t, launches.sums.numbers[3]
        steps = sum(math.ceil(min(examples, B - b) / step) for b in range(0, B, examples))
    padded = 2 * steps * step * across * tile.i * down * tile.o * (m if T == 1 else 1)
    assert found.products == padded
    # Elements: the square and, for each moment, a sum and a weight, once an example; a step for each of parts and out.
    if T > 1:
        assert found.elementwise <= across * tile.i * down * tile.o * (B * (1 + m + m * q) + m * (parts + 2)) * 1.1


@of("conv")
def test_conv(name):
    case, (found, _) = CASES[name], counted(name)
    sizes, e, x, g, out = case.sizes, case.dtype.itemsize, *(case.tensors[n] for n in ("x", "g", "out"))
    groups, kernel = x.shape[2] // out.shape[1], out.shape[2:]
    O, G, k = out.shape[0] // groups, out.shape[1], kernel.numel()  # noqa: E741
    tile = default_tile(TILES["16 bit" if e == 2 else "ieee"], O, G * k)
    one_tap = k * math.ceil(G / tile.i) <= 1.25 * math.ceil(G * k / tile.i)
    across = k * math.ceil(G / tile.i) if one_tap else math.ceil(G * k / tile.i)
    down = math.ceil(O / tile.o)
    # A pixel is read for every tap that reaches it: what a convolution's gradient of ones adds up.
    pixels, weight = torch.ones(x.flatten(0, 1).shape, requires_grad=True), torch.ones(groups, G, *kernel)
    torch.nn.functional.conv2d(pixels, weight, padding=[n // 2 for n in kernel], groups=groups).sum().backward()
    assert torch.equal(found.loads.of(x), down * pixels.grad.long().view(x.shape))
    assert everywhere(found.loads.of(g), across)
    parts, rest = divmod(found.stores.bytes, 4 * out.numel())
    parts -= 1
    assert rest == 0 and (parts > 1) == ("parts" in name)
    expected = e * (down * int(pixels.grad.sum()) + across * g.numel()) + 4 * out.numel() * (2 + 2 * parts)
    assert found.work.bytes == expected
    T = sizes["W"] * sizes["P"]
    step = max(16, min(tile.t, triton.next_power_of_2(T)))
    steps = sizes["B"] * math.ceil(T / step)
    assert found.products == 2 * steps * step * groups * across * tile.i * down * tile.o


@of("embedding")
def test_embedding(name):
    case, (found, _) = CASES[name], counted(name)
    tokens, g, out = (case.tensors[n] for n in ("tokens", "g", "out"))
    present = (tokens >= 0).unsqueeze(-1)
    assert torch.equal(found.loads.of(g), present.long().expand(g.shape))
    lists = torch.bincount(tokens[tokens >= 0], minlength=len(out))
    occurs = (lists > 0).long().unsqueeze(1).expand(out.shape)
    assert torch.equal(found.loads.of(out), occurs) and torch.equal(found.stores.of(out), occurs)
    H, m, q = out.shape[1], case.sizes.get("m", 1), case.sizes.get("q", 0)
    blocks = math.ceil(H / min(512, max(32, triton.next_power_of_2(H))))
    rows = 8 * int((lists + 7).div(8, rounding_mode="floor").sum())  # taken eight at a time
    index = 16 * tokens.numel() - 8 + 8 * int((lists > 0).sum()) + 8 * int(lists.sum()) + 4 * q * rows
    values = g.element_size() * H * int(present.sum()) + 8 * m * H * int((lists > 0).sum())
    assert found.work.bytes == values + blocks * index
    padded = min(512, max(32, triton.next_power_of_2(H))) * blocks
    assert found.work.flops <= padded * (rows * (1 + 3 * m) + int((lists > 0).sum()) * 5 * m)


@of("scale", "scale, bias")
def test_scale(name):
    case, (found, _) = CASES[name], counted(name)
    for operand in ("g", "x"):
        if operand in case.tensors:
            assert everywhere(found.loads.of(case.tensors[operand]), 1)
    assert everywhere(found.loads.of(case.tensors["out"]), 1) and everywhere(found.stores.of(case.tensors["out"]), 1)
    assert found.work.bytes <= 1.05 * case.floors().bytes and not found.products
    # Blocks are powers of two along each axis; a sum along positions adds each value twice.
    shape = case.tensors["g"].shape
    padding = math.prod(triton.next_power_of_2(n) / n for n in shape)
    assert found.work.flops <= 3.1 * padding * math.prod(shape)


def test_adding_parts_and_scaling_in_place():
    found, _ = counted("add_parts 3 x [9, 130]")
    case = CASES["add_parts 3 x [9, 130]"]
    assert everywhere(found.loads.of(case.tensors["parts"]), 1) and everywhere(found.stores.of(case.tensors["out"]), 1)
    assert found.work.bytes == case.floors().bytes
    found, _ = counted("scale_ [9001]")
    x = CASES["scale_ [9001]"].tensors["x"]
    assert everywhere(found.loads.of(x), 1) and everywhere(found.stores.of(x), 1)
    assert found.work.bytes == 4 * len(x) + 3 * 4  # each program reads the factor
    found, _ = counted("scale_ by 1 [9001]")
    assert found.work.bytes == 3 * 4 and not found.work.flops


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_operator_has_a_case():
    assert {case.operator for case in CASES.values()} == set(traffic.FLOORS)


def test_the_documented_part_is_what_is_counted():
    text = (Path(__file__).parents[1] / "docs/kernels.md").read_text()
    section = text.split("## Floors, counted")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ")]
    printed = list(traffic.table([traffic.record(case, counted(name)[0]) for name, case in CASES.items()]))
    assert len(shown) > 10 and set(shown) <= set(printed)


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(traffic, "cases", traffic.shared)
    monkeypatch.setattr("sys.argv", ["traffic", "--json", str(tmp_path / "rows.json")])
    traffic.main()
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(printed) - 2 == 3 and "| 23,400 | 23,400 | 1.00 | 1.00 |" in printed[2]
    assert rows[0]["counted_bytes"] == rows[0]["floor_bytes"] == 4 * 5 * 9 * 130
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
