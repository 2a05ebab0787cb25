"""alpha_for_percentile: numpy's percentiles of all finite ratios, exactly, and what is refused."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importances import SIZES, columns, dtypes, many_tensors, triple, triples
from torch import Tensor

from unlearn_fast import alpha_for_percentile, dampen_, reference
from unlearn_fast.ops import _order_statistics
from unlearn_fast.ops.alpha_for_percentile import _alpha_for_percentile

PERCENTS = [0, 100, 50, 1e-9, 0.1, 1, 12.5, 25, 33.3, 49.999, 66.6, 75, 90, 95, 99, 99.9, 99.999, 100 - 1e-12, 50]
INF, NAN = math.inf, math.nan


def ratios(f: list[Tensor], r: list[Tensor]) -> np.ndarray:
    """The finite ones, in float64."""
    found = [np.empty(0)]
    for a, b in zip(f, r, strict=True):
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        found.append((a.to(wide) / b.to(wide)).flatten().double().numpy())
    joined = np.concatenate(found)
    return joined[np.isfinite(joined)]


def assert_exact(f: list[Tensor], r: list[Tensor], q: list[float] = PERCENTS) -> None:
    """Equal to numpy, and the plain implementation, which serves other devices, to the compiled one."""
    expected = ratios(f, r)
    compiled, count = torch.ops.unlearn_fast.alpha_for_percentile(f, r, [float(x) for x in q])
    plain, plain_count = _alpha_for_percentile(f, r, [float(x) for x in q])
    assert int(count) == int(plain_count) == len(expected)
    assert torch.equal(compiled, plain)
    if len(expected) == 0:
        with pytest.raises(ValueError, match="forget and reference have no finite ratio"):
            alpha_for_percentile(f, r, q)
        return
    with np.errstate(all="ignore"):
        wanted = np.percentile(expected, q).tolist()
    found = alpha_for_percentile(f, r, q)
    assert found == wanted
    assert [alpha_for_percentile(f, r, x) for x in q[:5]] == wanted[:5]
    assert alpha_for_percentile(tuple(f), r, tuple(q)) == wanted == reference.alpha_for_percentile(f, r, q)


@settings(max_examples=25)
@given(rows=triples(), piece=st.sampled_from((1, 7, 1 << 24)))
def test_any_shapes_strides_and_dtypes(rows, piece):
    _, f, r = columns(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_order_statistics, "PIECE", max(piece, sum(t.numel() for t in f) // 20))
        assert_exact(f, r)


@given(
    values=st.lists(st.floats(width=32), min_size=2, max_size=40),
    dtypes=st.tuples(dtypes, dtypes),
    q=st.lists(st.floats(0, 100), min_size=1, max_size=30),
)
def test_any_values(values, dtypes, q):
    """NaN, infinities, zeros over zeros, subnormal and negative ones among them."""
    half = len(values) // 2
    f, r = (torch.tensor(x).to(d) for x, d in zip((values[:half], values[half : 2 * half]), dtypes, strict=True))
    assert_exact([f], [r], q)


@pytest.mark.parametrize("n", [n for n in SIZES if n])
def test_sizes_around_slabs_and_runs(n):
    _, f, r = triple(n, seed=n)
    assert_exact([f], [r])


NARROW = torch.tensor([2.0**-149, 3 * 2.0**-149, 1e-40, 2e-40, 2.0**-126])
KINDS = {
    "one": torch.tensor([3.25]),
    "two": torch.tensor([3.25, -1.0]),
    "all equal": torch.full((5000,), 1 / 3),
    "ties": torch.arange(5000) % 3 / 7,
    "ties between neighbours": torch.tensor([1.0] * 51 + [2.0] * 50),
    "consecutive numbers": torch.arange(1 << 23, (1 << 23) + 3000).to(torch.int32).view(torch.float32),
    "across a digit": torch.arange((1 << 30) - 1500, (1 << 30) + 1500).to(torch.int32).view(torch.float32),
    "huge spread": torch.logspace(-38, 38, 4001),
    "both signs, huge": torch.cat([torch.logspace(-44, 38, 2000), -torch.logspace(-44, 38, 2000)]),
    "subnormal": NARROW.repeat(100),
    "zeros of both signs": torch.tensor([0.0, -0.0] * 20),
    "the largest": torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_hard_to_tell_apart(kind, dtype):
    values = KINDS[kind][torch.randperm(len(KINDS[kind]), generator=torch.Generator().manual_seed(0))].to(dtype)
    assert_exact([values], [torch.ones_like(values)])
    assert_exact([values, -values], [torch.ones_like(values)] * 2)


def test_float64_ratios_that_agree_in_48_bits():
    values = 1 + torch.arange(-700, 700, dtype=torch.float64) * 2**-52
    assert_exact([values], [torch.ones(1400)])
    assert_exact([values, torch.ones(3)], [torch.ones(1400), torch.tensor([1.0, 2.0, 3.0]).bfloat16()])
    assert_exact([values * 1e-310], [torch.ones(1400)])


def test_spreads_beyond_float64_are_numpys():
    values = torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64)
    with np.errstate(all="ignore"):
        wanted = np.percentile(values.numpy(), [0, 20, 50, 100])
    assert np.array_equal(alpha_for_percentile([values], [torch.ones(2)], [0, 20, 50, 100]), wanted, equal_nan=True)


def test_what_is_not_finite_does_not_count():
    f = torch.tensor([NAN, 1.0, 0.0, 1.0, INF, 3e38, 6.0, 2.0, 1.0])
    r = torch.tensor([1.0, NAN, 0.0, 0.0, 1.0, 1e-5, 2.0, 1.0, INF])
    assert alpha_for_percentile([f], [r], [0, 50, 100]) == [0.0, 2.0, 3.0]
    assert_exact([f], [r])


def test_hundreds_of_tensors_many_percentiles_and_any_number_of_threads():
    """More percentiles than are looked for in one pass."""
    _, f, r = columns(many_tensors(150))
    q = np.linspace(0, 100, 173).tolist()
    wanted, threads = np.percentile(ratios(f, r), q).tolist(), torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert alpha_for_percentile(f, r, q) == wanted
    torch.set_num_threads(threads)
    assert_exact(f[:50], r[:50], q[::20])


def test_more_percentiles_of_float64_than_are_looked_for_in_one_pass():
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(100_000, generator=generator, dtype=torch.float64) * 50).exp()
    q = np.linspace(0, 100, 61).tolist()
    assert alpha_for_percentile([values], [torch.ones(100_000)], q) == np.percentile(values.numpy(), q).tolist()


def test_the_share_that_is_selected():
    _, f, r = triple(100_000, hostile=False)
    for q in (50.0, 90.0, 99.5):
        report = dampen_([torch.ones(100_000)], [f], [r], alpha=alpha_for_percentile([f], [r], q))
        assert report.total.share == pytest.approx(1 - q / 100, abs=1e-4)


def test_names_are_matched_in_any_order_and_with_the_wrappers_prefix():
    f = {"a": torch.tensor([1.0, 2.0]), "module.b": torch.tensor([30.0])}
    r = {"b": torch.tensor([10.0]), "module.a": torch.tensor([1.0, 1.0])}
    assert alpha_for_percentile(f, r, [0, 50, 100]) == [1.0, 2.0, 3.0]
    f, r = {"module.w": torch.tensor([8.0]), "w": torch.tensor([3.0])}, {"w": torch.ones(1), "module.w": torch.ones(1)}
    assert alpha_for_percentile(f, r, [0, 100]) == [3.0, 8.0]


def test_what_requires_grad_and_what_is_made_in_inference_mode():
    f = torch.tensor([4.0, 2.0], requires_grad=True)
    with torch.inference_mode():
        r = torch.ones(2)
    assert alpha_for_percentile([f], [r], 100) == 4.0 and isinstance(alpha_for_percentile([f], [r], 0), float)
    assert alpha_for_percentile([f], [r], []) == []


A = [torch.ones(2)]


@pytest.mark.parametrize(
    ("f", "r", "q", "error", "message"),
    [
        (A, A, -1, ValueError, "q is -1: it must be between 0 and 100"),
        (A, A, 100.1, ValueError, "q is 100.1: it must be between 0 and 100"),
        (A, A, [50, NAN], ValueError, "q is nan: it must be between 0 and 100"),
        (A, A, "50", TypeError, "q is '50': it must be a number"),
        (A, A, [True], TypeError, "q is True: it must be a number"),
        (A, A, None, TypeError, "q is None: it must be a number, or a list of numbers"),
        (A, A, np.ones(2), TypeError, "q is array([1., 1.]): it must be a number, or a list of numbers"),
        ({"a": A[0]}, A, 50, TypeError, "forget and reference are a mapping and a list: both must be of one kind"),
        (A, A * 2, 50, ValueError, "reference has 2 tensors: it must have 1, as forget has"),
        (A, [torch.ones(3)], 50, ValueError, "reference['0'] has shape [3]: it must have that of forget, [2]"),
        ({"a": A[0]}, {"b": A[0]}, 50, ValueError, "reference has no 'a', and forget has: both must have the same"),
        ({"a": A[0]}, {"a": A[0], "b": A[0]}, 50, ValueError, "reference has 'b', and forget has not"),
        ({"a": A[0]}, {"a": A[0], "module.a": A[0]}, 50, ValueError, "reference has 'module.a', and forget has not"),
        ({"a": A[0], "module.a": A[0]}, {"a": A[0]}, 50, ValueError, "reference has no 'module.a', and forget has"),
        ([1.0], A, 50, TypeError, "forget['0'] is a float: it must be a tensor"),
        (A, [torch.ones(2).int()], 50, TypeError, "reference['0'] has dtype torch.int32: it must be float32"),
        ([torch.ones(2).to_sparse()], A, 50, TypeError, "forget['0'] has layout torch.sparse_coo: it must be a dense"),
        (torch.ones(2), A, 50, TypeError, "forget is a Tensor: it must be a mapping name -> tensor, or a list"),
        ([], [], 50, ValueError, "forget and reference have no finite ratio f / r: alpha cannot be chosen"),
        (A, [torch.zeros(2)], 50, ValueError, "forget and reference have no finite ratio"),
    ],
)
def test_errors(f, r, q, error, message):
    with pytest.raises(error, match=re.escape(message)):
        alpha_for_percentile(f, r, q)


def test_compiled_as_one_graph():
    _, f, r = triple((7, 30))

    def run(f: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        neighbours, count = torch.ops.unlearn_fast.alpha_for_percentile([f], [r], [0.0, 50.0, 90.0])
        return neighbours * 1, count + 0

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(f, r)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(f, r), strict=True))
