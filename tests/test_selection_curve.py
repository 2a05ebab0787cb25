"""selection_curve: what dampen_ would select with every alpha."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from importances import SIZES, clones, columns, many_tensors, same, triple, triples
from torch import Tensor

from unlearn_fast import SelectionCurve, dampen_, reference, selection_curve
from unlearn_fast.ops.selection_curve import _selection_curve

INF, NAN = math.inf, math.nan
ALPHAS = [0.0, 1e-40, 0.1, 0.5, 1.0, 1.999, 2.0, 2.0, 2.5, 3.0, 1e30, 1e39, INF, 0.7]


def assert_as_dampen(f: list[Tensor], r: list[Tensor], alphas: list[float]) -> None:
    """The report's counts for every alpha; and the plain implementation's, which serves other devices."""
    curve = selection_curve(f, r, alphas)
    for column, alpha in enumerate(alphas):
        report = dampen_([torch.ones(t.shape) for t in f], f, r, alpha=alpha)
        assert [counts.selected for counts in report.parameters.values()] == curve.counts[:, column].tolist()
        assert report.total.selected == curve.total[column] and report.total.share == curve.share[column]
    assert torch.equal(_selection_curve(f, r, alphas).view(len(f), len(alphas)), curve.counts)
    assert torch.equal(reference.selection_curve(f, r, alphas).counts, curve.counts)
    assert curve.elements == tuple(t.numel() for t in f) and curve.alphas == tuple(map(float, alphas))
    assert curve.counts.dtype == torch.int64 and curve.counts.shape == (len(f), len(alphas))


@given(rows=triples(), alphas=st.lists(st.sampled_from(ALPHAS), max_size=6))
def test_any_shapes_strides_and_dtypes(rows, alphas):
    _, f, r = columns(rows)
    before = clones([*f, *r])
    assert_as_dampen(f, r, alphas)
    assert same([*f, *r], before)


@given(values=st.lists(st.floats(width=32), min_size=2, max_size=40), alphas=st.lists(st.floats(0), max_size=8))
def test_any_values_and_alphas(values, alphas):
    half = len(values) // 2
    assert_as_dampen([torch.tensor(values[:half])], [torch.tensor(values[half : 2 * half])], alphas)


@pytest.mark.parametrize("n", SIZES)
def test_sizes_around_slabs_and_runs(n):
    _, f, r = triple(n, seed=n)
    assert_as_dampen([f], [r], [0.0, 0.5, 2.0])


def test_hundreds_of_tensors_and_any_number_of_threads():
    _, f, r = columns(many_tensors())
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(selection_curve(f, r, ALPHAS).counts)
    torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert_as_dampen(f, r, ALPHAS[2:5])


def test_float64_importances_select_exactly():
    f, r = torch.tensor([2 + 1e-12, 2 - 1e-12], dtype=torch.float64), torch.ones(2)
    assert selection_curve([f], [r], [2.0, 2 - 1e-11]).total == [1, 2]


def test_alphas_in_any_order_are_each_their_own():
    f, r = torch.arange(10.0), torch.ones(10)
    assert selection_curve([f], [r], [5, 0, 8.5, 0, 100]).total == [4, 9, 1, 9, 0]
    assert selection_curve([f], [r], range(3)).total == [9, 8, 7]


def test_names_and_shares():
    f = {"module.a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[3.0]]), "empty": torch.ones(0)}
    r = {"b": torch.ones(1, 1), "a": torch.ones(2), "empty": torch.ones(0)}
    curve = selection_curve(f, r, [2.0, 4.0])
    assert isinstance(curve, SelectionCurve)
    assert curve.names == ("module.a", "b", "empty") and curve.counts.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert curve.total == [2, 1] and curve.share == [2 / 3, 1 / 3]


@pytest.mark.parametrize(("names", "alphas"), [(0, 2), (0, 0), (2, 0)])
def test_nothing_to_count(names, alphas):
    curve = selection_curve([torch.ones(3)] * names, [torch.ones(3)] * names, [1.0] * alphas)
    assert curve.counts.shape == (names, alphas) and curve.total == [0] * alphas and curve.share == [0.0] * alphas


@pytest.mark.parametrize(
    "alphas", [[1.0, 2.0, 4.0], [0.0, 4.0, 1.0], [2.0], [100.0, 1000.0], [1.0, INF], [0.0], []], ids=str
)
def test_plot(tmp_path, alphas):
    """Nothing selected, zero and one alpha included."""
    pytest.importorskip("matplotlib")
    f = {"a": torch.arange(5.0), "empty": torch.ones(0), "b": torch.ones(3)}
    r = {name: torch.ones_like(t) for name, t in f.items()}
    selection_curve(f, r, alphas).plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


A = [torch.ones(2)]


@pytest.mark.parametrize(
    ("f", "r", "alphas", "error", "message"),
    [
        (A, A, 2.0, TypeError, "alphas is a float: it must be a list of numbers"),
        (A, A, "12", TypeError, "alphas is a str: it must be a list of numbers"),
        (A, A, [1.0, -1.0], ValueError, "alphas[1] is -1.0: it must be >= 0"),
        (A, A, [NAN], ValueError, "alphas[0] is nan: it must be >= 0"),
        (A, A, ["1"], TypeError, "alphas[0] is '1': it must be a number"),
        (A, [torch.ones(2, 1)], [1.0], ValueError, "reference['0'] has shape [2, 1]: it must have that of forget, [2]"),
        ({"a": A[0]}, {"b": A[0]}, [1.0], ValueError, "reference has no 'a', and forget has"),
        (A, {"0": A[0]}, [1.0], TypeError, "forget and reference are a mapping and a list"),
        ([torch.ones(2).bool()], A, [1.0], TypeError, "forget['0'] has dtype torch.bool: it must be float32"),
        (None, A, [1.0], TypeError, "forget is a NoneType: it must be a mapping name -> tensor, or a list"),
    ],
)
def test_errors(f, r, alphas, error, message):
    with pytest.raises(error, match=re.escape(message)):
        selection_curve(f, r, alphas)


def test_compiled_as_one_graph():
    _, f, r = triple((7, 30))

    def run(f: Tensor, r: Tensor) -> Tensor:
        return torch.ops.unlearn_fast.selection_curve([f, f * 2], [r, r], [0.0, 1.5, 4.0]) * 2

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(f, r), run(f, r))
