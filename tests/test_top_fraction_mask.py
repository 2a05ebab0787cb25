"""top_fraction_mask: a stable descending sort's choice, exactly as many as asked for."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importances import SIZES, any_bits, dtypes, layouts, many_tensors, shapes, triple
from torch import Tensor

from unlearn_fast import reference, top_fraction_mask
from unlearn_fast.ops import _order_statistics
from unlearn_fast.ops.top_fraction_mask import _top_fraction_mask

INF, NAN = math.inf, math.nan


def by_sorting(scores: list[Tensor], count: int) -> list[Tensor] | None:
    """None where too few are numbers."""
    joined = torch.cat([torch.empty(0, dtype=torch.float64), *(t.flatten().double() for t in scores)])
    numbers = (~joined.isnan()).nonzero().flatten()
    if count > len(numbers):
        return None
    order = numbers[joined[numbers].sort(descending=True, stable=True).indices]
    mask = torch.zeros(len(joined), dtype=torch.bool)
    mask[order[:count]] = True
    return [part.view(t.shape) for part, t in zip(mask.split([t.numel() for t in scores]), scores, strict=True)]


def assert_as_sorted(scores: list[Tensor], fraction: float) -> None:
    """Ours, and the plain implementation, which serves other devices."""
    count = int(fraction * sum(t.numel() for t in scores))
    wanted = by_sorting(scores, count)
    if wanted is None:
        with pytest.raises(
            ValueError, match=rf"scores has only \d+ values that are not NaN: fraction .* needs {count}"
        ):
            top_fraction_mask(scores, fraction)
        with pytest.raises(RuntimeError, match=rf"scores has \d+ values that are not NaN: it must have {count}"):
            _top_fraction_mask(scores, count)
        return
    for masks in (top_fraction_mask(scores, fraction), _top_fraction_mask(scores, count)):
        assert [m.dtype for m in masks] == [torch.bool] * len(scores) and all(m.is_contiguous() for m in masks)
        assert sum(int(m.sum()) for m in masks) == count
        assert all(torch.equal(m, w) for m, w in zip(masks, wanted, strict=True))


fractions = st.sampled_from((0.0, 1.0, 0.5, 1e-3, 0.1, 0.29, 0.999, 1 / 3)) | st.floats(0, 1)


@settings(max_examples=40)
@given(
    kinds=st.lists(st.tuples(shapes, dtypes, layouts, st.integers(0, 999)), max_size=5),
    fraction=fractions,
    piece=st.sampled_from((7, 100, 1 << 24)),
)
def test_any_shapes_strides_and_dtypes(kinds, fraction, piece):
    scores = [
        triple(shape, (dtype,) * 3, seed, ("contiguous", layout, layout))[1] for shape, dtype, layout, seed in kinds
    ]
    piece = max(piece, sum(t.numel() for t in scores) // 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_order_statistics, "PIECE", piece)
        patch.setitem(_top_fraction_mask.__globals__, "PIECE", piece)  # the function hides its module
        assert_as_sorted(scores, fraction)


@given(
    values=st.lists(st.lists(st.floats(width=32) | st.sampled_from((0.0, -0.0, 1.0, INF, -INF, NAN)), max_size=20)),
    dtype=dtypes,
    fraction=fractions,
)
def test_any_values(values, dtype, fraction):
    assert_as_sorted([torch.tensor(x).to(dtype) for x in values], fraction)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["different", "few different", "all equal"])
def test_sizes_around_slabs_and_runs(n, kind):
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(n)).float()
    scores = {"different": scores, "few different": scores % 3, "all equal": torch.zeros(n)}[kind]
    for fraction in (0.0, 0.3, 0.5, 1.0):
        assert_as_sorted([scores, scores[: n // 3]], fraction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_bits(dtype):
    """NaN of every payload are never marked."""
    scores = any_bits((70_001,), dtype, torch.Generator().manual_seed(1))
    numbers = int((~scores.isnan()).sum())
    for fraction in (0.0, 0.1, 0.5, numbers / 70_001, 1.0):
        assert_as_sorted([scores, scores[:100].view(10, 10)], fraction * 0.99)
        assert_as_sorted([scores], fraction)


def test_zeros_of_both_signs_are_ties():
    scores = [torch.tensor([-0.0, 0.0, -1.0, -0.0]), torch.tensor([0.0, 1.0])]
    assert [m.tolist() for m in top_fraction_mask(scores, 0.5)] == [[True, True, False, False], [False, True]]
    assert_as_sorted(scores, 0.7)


def test_infinities_are_the_ends():
    scores = [torch.tensor([-INF, 1.0, INF, torch.finfo(torch.float32).max, INF, -INF])]
    assert top_fraction_mask(scores, 0.34)[0].tolist() == [False, False, True, False, True, False]
    for k in range(7):
        assert_as_sorted(scores, k / 6)


def test_nan_is_never_marked():
    scores = [torch.tensor([NAN, 1.0, -NAN, -INF])]
    assert top_fraction_mask(scores, 0.5)[0].tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"scores has only 2 values that are not NaN: fraction 0\.75 needs 3"):
        top_fraction_mask(scores, 0.75)


def test_float64_scores_that_differ_in_the_last_bit():
    scores = 1 + torch.randperm(1500).double() * 2**-52
    for fraction in (0.1, 0.5, 0.9):
        assert_as_sorted([scores, torch.ones(5), scores.float()], fraction)


def test_hundreds_of_tensors_and_any_number_of_threads():
    """Ties across tensors and runs among them."""
    scores = [row[1].round(decimals=1) for row in many_tensors(120)]
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        for fraction in (0.001, 0.37, 0.8):
            assert_as_sorted(scores, fraction)
    torch.set_num_threads(threads)


def test_fractions_are_rounded_down_as_published():
    """int(fraction * n) in float64: 0.29 * 100 is below 29."""
    assert int(top_fraction_mask([torch.arange(100.0)], 0.29)[0].sum()) == int(0.29 * 100) == 28


def test_names_shapes_and_kinds():
    scores = {"b": torch.tensor([[3.0, 1.0]]), "a": torch.tensor(2.0), "empty": torch.ones(0, 3)}
    masks = top_fraction_mask(scores, 0.7)
    assert {name: mask.tolist() for name, mask in masks.items()} == {"b": [[True, False]], "a": True, "empty": []}
    assert list(masks) == list(scores) and masks["empty"].shape == (0, 3)
    assert all(torch.equal(masks[n], m) for n, m in reference.top_fraction_mask(scores, 0.7).items())
    assert isinstance(top_fraction_mask(tuple(scores.values()), 0.7), list)
    assert top_fraction_mask({}, 0.5) == {} and top_fraction_mask([], 1) == []


def test_what_requires_grad_and_channels_last():
    scores = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = top_fraction_mask([scores], 0.3)[0]
    assert not plain.requires_grad
    assert torch.equal(top_fraction_mask([scores.to(memory_format=torch.channels_last)], 0.3)[0], plain)


A = [torch.ones(2)]


@pytest.mark.parametrize(
    ("scores", "fraction", "error", "message"),
    [
        (A, -0.1, ValueError, "fraction is -0.1: it must be between 0 and 1"),
        (A, 1.01, ValueError, "fraction is 1.01: it must be between 0 and 1"),
        (A, NAN, ValueError, "fraction is nan: it must be between 0 and 1"),
        (A, "half", TypeError, "fraction is 'half': it must be a number"),
        (A, True, TypeError, "fraction is True: it must be a number"),
        (torch.ones(2), 0.5, TypeError, "scores is a Tensor: it must be a mapping name -> tensor, or a list"),
        ([1.0], 0.5, TypeError, "scores['0'] is a float: it must be a tensor"),
        ({"a": torch.ones(2).long()}, 0.5, TypeError, "scores['a'] has dtype torch.int64: it must be float32"),
        ([torch.ones(2).to_sparse()], 0.5, TypeError, "scores['0'] has layout torch.sparse_coo: it must be a dense"),
    ],
)
def test_errors(scores, fraction, error, message):
    with pytest.raises(error, match=re.escape(message)):
        top_fraction_mask(scores, fraction)


def test_compiled_as_one_graph():
    scores = triple((7, 30), hostile=False)[1]

    def run(scores: Tensor) -> list[Tensor]:
        return [~mask for mask in torch.ops.unlearn_fast.top_fraction_mask([scores, scores[0]], 55)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(scores)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(scores), strict=True))
