"""The numpy door: the same bits as the torch operator, in arrays and memory maps, and no torch tensor on the way."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils._python_dispatch import TorchDispatchMode

import unlearn_fast
from unlearn_fast import _library
from unlearn_fast.numpy import dampen_

DTYPES = (np.float16, np.float32, np.float64)
SETTINGS = {"alpha": 1.5, "lam": 1.2, "cap": 0.9}


def make_arrays(shape, dtypes=(np.float32, np.float32, np.float32), seed: int = 0):
    """Parameters and importances, infinities, NaN and zeros among them."""
    generator = np.random.default_rng(seed)
    p, f, r = (generator.standard_normal((1, *shape))[0, ...] for _ in range(3))  # arrays, 0-dimensional ones too
    f, r = np.asarray(np.exp(2 * f)), np.asarray(np.exp(2 * r))
    for array in (p, f, r):
        for value in (0.0, math.inf, math.nan):
            array[generator.random(shape) < 0.05] = value
    return [np.asarray(x, dtype) for x, dtype in zip((p, f, r), dtypes, strict=True)]


def by_torch(p: np.ndarray, f: np.ndarray, r: np.ndarray, **settings):
    """Contiguous copies through the torch operator: the parameter and its counts."""
    param, *importances = (torch.tensor(np.ascontiguousarray(x).reshape(x.shape)) for x in (p, f, r))
    counts = unlearn_fast.dampen_([param], importances[:1], importances[1:], **settings).total
    return param.numpy(), counts


def assert_same(result: np.ndarray, counts, expected) -> None:
    param, wanted = expected
    unsigned = f"u{result.itemsize}"
    assert np.array_equal(np.ascontiguousarray(result).view(unsigned), np.ascontiguousarray(param).view(unsigned))
    assert counts[:4] == wanted[:4]
    assert counts.mean_factor == pytest.approx(wanted.mean_factor, rel=1e-14, nan_ok=True)


def lay_out(x: np.ndarray, layout: str) -> np.ndarray:
    """A copy in another layout."""
    match layout:
        case "fortran":
            return x.copy(order="F")
        case "strided" if x.ndim:
            place = np.full([2 * n for n in x.shape], np.nan, x.dtype)[(slice(None, None, 2),) * x.ndim]
        case "inside" if x.ndim:
            place = np.full([n + 2 for n in x.shape], np.nan, x.dtype)[(slice(1, -1),) * x.ndim]
        case "last axis first" if x.ndim > 1:
            return np.moveaxis(np.moveaxis(x, -1, 0).copy(), 0, -1)
        case _:
            return x.copy()
    place[...] = x
    return place


LAYOUTS = ("contiguous", "fortran", "strided", "inside", "last axis first")


@given(
    shape=st.lists(st.sampled_from((0, 1, 2, 3, 7, 17)), max_size=4).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_the_torch_operator(shape, dtypes, layouts, seed):
    arrays = make_arrays(shape, dtypes, seed)
    expected = by_torch(*arrays, **SETTINGS)
    p, f, r = map(lay_out, arrays, layouts)
    memory = p.base if p.base is not None else p
    outside = np.count_nonzero(np.isnan(memory)) - np.count_nonzero(np.isnan(p))
    counts = dampen_(p, f, r, **SETTINGS)
    assert_same(p, counts, expected)
    assert np.count_nonzero(np.isnan(memory)) - np.count_nonzero(np.isnan(p)) == outside  # the gaps are as they were
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip((f, r), arrays[1:], strict=True))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 127, 128, 129, 65537, 300_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_length(n, dtype):
    arrays = make_arrays((n,), (dtype, np.float32, np.float32))
    expected = by_torch(*arrays, **SETTINGS)
    assert_same(arrays[0], dampen_(*arrays, **SETTINGS), expected)


@pytest.mark.parametrize("exponent", [0.5, 2.0, 3.0, 1.7])
def test_exponents(exponent):
    arrays = make_arrays((1000,))
    expected = by_torch(*arrays, alpha=1.0, exponent=exponent)
    assert_same(arrays[0], dampen_(*arrays, alpha=1.0, exponent=exponent), expected)


def test_memory_mapped_files(tmp_path):
    """Parameters are changed on disk; importances may be read-only maps."""
    arrays = make_arrays((70, 1001))
    expected = by_torch(*arrays, **SETTINGS)
    for name, array in zip("pfr", arrays, strict=True):
        array.tofile(tmp_path / name)
    p, f, r = (
        np.memmap(tmp_path / name, np.float32, mode, shape=(70, 1001))
        for name, mode in (("p", "r+"), ("f", "r"), ("r", "r"))
    )
    counts = dampen_(p, f, r, **SETTINGS)
    p.flush()
    assert_same(np.fromfile(tmp_path / "p", np.float32).reshape(70, 1001), counts, expected)
    assert np.array_equal(np.fromfile(tmp_path / "f", np.float32), arrays[1].ravel(), equal_nan=True)


def test_part_of_a_memory_map(tmp_path):
    before = make_arrays((100,))[0]
    before.tofile(tmp_path / "p")
    p = np.memmap(tmp_path / "p", np.float32, "r+", offset=40)[5:25]
    dampen_(p, np.full(20, 4, np.float32), np.ones(20, np.float32), alpha=1.0)
    p.base.flush() if isinstance(p.base, np.memmap) else p.flush()
    after = np.fromfile(tmp_path / "p", np.float32)
    expected = before.copy()
    expected[15:35] *= np.float32(0.25)
    assert np.array_equal(after, expected, equal_nan=True)


def test_unaligned_memory():
    arrays = make_arrays((1000,))
    expected = by_torch(*arrays, **SETTINGS)
    p = np.frombuffer(bytearray(4001), np.float32, offset=1)
    p[:] = arrays[0]
    assert_same(p, dampen_(p, *arrays[1:], **SETTINGS), expected)


def test_no_torch_tensor_is_made(monkeypatch):
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(f"{function} was called")

    def refuse(*_, **__):
        raise AssertionError("a tensor was made of an array")

    for name in ("from_numpy", "as_tensor", "asarray", "tensor", "frombuffer", "from_dlpack"):
        monkeypatch.setattr(torch, name, refuse)
    arrays = [lay_out(x, "fortran") for x in make_arrays((20, 30), DTYPES)]
    with Nothing():
        assert dampen_(*arrays, **SETTINGS).elements == 600


def test_empty_and_0_dimensional():
    p = np.array(8.0, np.float32)
    assert dampen_(p, np.array(4.0), np.array(1.0), alpha=1.0)[:2] == (1, 1) and p == 2
    counts = dampen_(*make_arrays((3, 0, 2)), alpha=1.0)
    assert counts[:4] == (0, 0, 0, 0) and math.isnan(counts.mean_factor)


# Errors


def ones(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def read_only() -> np.ndarray:
    p = ones(4)
    p.flags.writeable = False
    return p


ERRORS = {
    "list": ([1.0] * 4, ones(4), ones(4), TypeError, "p is a list: it must be a numpy array"),
    "tensor": (torch.ones(4), ones(4), ones(4), TypeError, "p is a Tensor"),
    "scalar": (np.float32(1), ones(), ones(), TypeError, "p is a float32"),
    "integers": (ones(4, dtype=np.int32), ones(4), ones(4), TypeError, "p has dtype int32: it must be float16"),
    "complex": (ones(4), ones(4, dtype=np.complex64), ones(4), TypeError, "f has dtype complex64"),
    "long double": (ones(4), ones(4), ones(4, dtype=np.longdouble), TypeError, "r has dtype"),
    "other byte order": (ones(4).astype(np.dtype(np.float32).newbyteorder()), ones(4), ones(4), TypeError, "native"),
    "objects": (ones(4, dtype=object), ones(4), ones(4), TypeError, "p has dtype object"),
    "shape": (ones(4), ones(2, 2), ones(4), ValueError, "f has shape (2, 2): it must have that of p, (4,)"),
    "shape that broadcasts": (ones(4), ones(4), ones(1), ValueError, "r has shape (1,)"),
    "read-only": (read_only(), ones(4), ones(4), ValueError, "p is read-only"),
    "broadcast": (np.lib.stride_tricks.as_strided(ones(1), (4,), (0,)), ones(4), ones(4), ValueError, "overlapping"),
    "reversed": (ones(4)[::-1], ones(4), ones(4), ValueError, "reversed"),
    "sliding windows": (
        sliding_window_view(ones(6), 3, writeable=True), ones(4, 3), ones(4, 3), ValueError, "overlapping",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("p", "f", "r", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments(p, f, r, error, message):
    with pytest.raises(error, match=re.escape(message)):
        dampen_(p, f * 4, r, alpha=1.0)
    assert np.all(np.asarray(p) == 1)


@pytest.mark.parametrize(
    "settings", [{"alpha": -1}, {"alpha": 1, "lam": math.nan}, {"alpha": 1, "exponent": 0}], ids=str
)
def test_bad_settings(settings):
    p = ones(4)
    with pytest.raises(ValueError, match=f"{list(settings)[-1]} is"):
        dampen_(p, ones(4), ones(4) * 0, **settings)
    assert np.all(p == 1)


def test_a_read_only_memory_map_is_refused(tmp_path):
    ones(4).tofile(tmp_path / "p")
    with pytest.raises(ValueError, match="p is read-only: open a memory map with mode 'r\\+'"):
        dampen_(np.memmap(tmp_path / "p", np.float32, "r"), ones(4), ones(4), alpha=0.5)


def test_without_the_compiled_part_the_error_says_why(monkeypatch):
    monkeypatch.setattr(_library, "native", None)
    monkeypatch.setitem(_library.missing, "native", "no compiler was found")
    p = ones(4)
    with pytest.raises(RuntimeError, match="the numpy door needs the compiled part: no compiler was found"):
        dampen_(p, ones(4), ones(4), alpha=0.5)
    assert np.all(p == 1)
