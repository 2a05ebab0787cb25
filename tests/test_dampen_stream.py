"""Streaming of importances, a piece at a time: all of it here on the CPU, where nothing has to be copied."""

import contextlib
import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from importances import ALPHA, SIZES, clones, columns, many_tensors, same, triple, triples
from layouts import surroundings
from torch import Tensor

from unlearn_fast import dampen_, undo_
from unlearn_fast.ops import dampen as module
from unlearn_fast.ops.dampen import stream
from unlearn_fast.ops.dampen.align import Entry, align
from unlearn_fast.ops.dampen.stream import Lane, Part, dampen_streamed_, pieces

OPERATORS = torch.ops.unlearn_fast


def streamed(params: list[Tensor], f: list[Tensor], r: list[Tensor], alphas: list[float], piece: int) -> Tensor:
    """The counts; parameters are dampened through pieces of this many elements."""

    def dampen(indices: list[int], *tensors: list[Tensor]) -> Tensor:
        assert sum(t.numel() for t in tensors[0]) <= piece
        own = [alphas[i] for i in indices]
        return torch.ops.unlearn_fast.dampen_(*tensors, own, [0.5] * len(own), 1.0, 1.0, 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE", piece)
        return dampen_streamed_(align(params, f, r).entries, dampen)


# Pieces


@given(sizes=st.lists(st.integers(0, 30), max_size=12), limit=st.integers(1, 40))
def test_pieces_are_all_elements_in_order_and_full_but_the_last(sizes, limit):
    found = list(pieces(sizes, limit))
    elements = [(part.entry, k) for piece in found for part in piece for k in range(part.start, part.stop)]
    assert elements == [(entry, k) for entry, size in enumerate(sizes) for k in range(size)]
    filled = [sum(part.stop - part.start for part in piece) for piece in found]
    assert all(n == limit for n in filled[:-1]) and all(0 < n <= limit for n in filled)
    assert all(part.start < part.stop for piece in found for part in piece)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([0, 0], []),
        ([4], [[Part(0, 0, 4)]]),
        ([5], [[Part(0, 0, 4)], [Part(0, 4, 5)]]),
        ([3, 0, 3], [[Part(0, 0, 3), Part(2, 0, 1)], [Part(2, 1, 3)]]),
        ([9], [[Part(0, 0, 4)], [Part(0, 4, 8)], [Part(0, 8, 9)]]),
    ],
    ids=str,
)
def test_pieces_of_four(sizes, expected):
    assert list(pieces(sizes, 4)) == expected


def test_the_piece_of_the_library_is_the_buffers():
    """A lane's buffers hold what a piece has at most."""
    assert [len(piece) for piece in pieces([stream.PIECE, 1], stream.PIECE)] == [1, 1]


# Dampening


@given(rows=triples(), piece=st.sampled_from((1, 3, 50, 1 << 24)))
def test_any_shapes_strides_and_dtypes(rows, piece):
    """As without pieces, bit for bit; but sums of factors are added in another order."""
    params, f, r = columns(rows)
    if not params:
        return
    around, plain = [surroundings(p) for p in params], clones(params)
    alphas = [ALPHA / (1 + k) for k in range(len(params))]
    wanted = torch.ops.unlearn_fast.dampen_(plain, f, r, alphas, [0.5] * len(params), 1.0, 1.0, 0.1)
    if max(p.numel() for p in params) > 1000 * piece:
        piece = 50
    table = streamed(params, f, r, alphas, piece)
    assert same(params, plain) and torch.equal(table[:, :3], wanted[:, :3])
    torch.testing.assert_close(table[:, 3], wanted[:, 3], rtol=1e-12, atol=0, equal_nan=True)
    assert all(torch.equal(surroundings(p), rest) for p, rest in zip(params, around, strict=True))


@pytest.mark.parametrize("n", SIZES[1:])
@pytest.mark.parametrize("piece", [512, 65536, 65537])
def test_sizes_around_blocks_runs_and_pieces(n, piece):
    rows = [triple(n, seed=n), triple(3, seed=1), triple(n // 2, seed=2)]
    params, f, r = columns(rows)
    plain = clones(params)
    wanted = torch.ops.unlearn_fast.dampen_(plain, f, r, [ALPHA] * 3, [0.5] * 3, 1.0, 1.0, 0.1)
    table = streamed(params, f, r, [ALPHA] * 3, piece)
    assert same(params, plain) and torch.equal(table[:, :3], wanted[:, :3])


def test_hundreds_of_tensors():
    params, f, r = columns(many_tensors())
    plain, alphas = clones(params), [k % 7 * 0.5 for k in range(300)]
    wanted = torch.ops.unlearn_fast.dampen_(plain, f, r, alphas, [0.5] * 300, 1.0, 1.0, 0.1)
    table = streamed(params, f, r, alphas, 1000)
    assert same(params, plain) and torch.equal(table[:, :3], wanted[:, :3])


def test_expanded_importances_and_channels_last_parameters():
    p = torch.full((2, 3, 4, 5), 8.0).to(memory_format=torch.channels_last)
    f, r = torch.full((), 4.0).expand(p.shape), torch.ones(1).expand(p.shape)
    table = streamed([p], [f], [r], [ALPHA], 7)
    assert p.eq(1).all() and table[0, 0] == 120 and p.is_contiguous(memory_format=torch.channels_last)


def test_a_lane_of_the_cpu_brings_the_same_tensors():
    f, r = torch.ones(3), torch.zeros(3)
    lane = Lane(torch.device("cpu"), 3)
    with lane.bring([[f], [r]]) as brought:
        assert brought[0][0] is f and brought[1][0] is r
    lane.wait()


class Recorded:
    """Stands for CUDA's streams and events; all of them write one log."""

    log: ClassVar[list[str]] = []

    def __init__(self, *_: object) -> None: ...

    def __getattr__(self, what: str):
        return lambda *_: self.log.append(what)


@pytest.mark.parametrize("piece", [7, 100, 5000])
def test_the_lanes_of_a_gpu_with_stand_ins_for_its_streams(monkeypatch, piece):
    """The bookkeeping alone: what goes where, and that memory is not written before its last use was waited for."""
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Recorded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Recorded())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, *, dtype, **_: empty(n, dtype=dtype))
    monkeypatch.setattr(stream, "Lane", lambda _, elements: Lane(SimpleNamespace(type="cuda"), elements))
    Recorded.log.clear()
    dtypes = [(torch.float32, torch.float32, torch.bfloat16), (torch.float16,) * 3, (torch.bfloat16,) * 3]
    rows = [triple(n, three) for n, three in zip((501, 0, 40), dtypes, strict=True)]
    p, f, r = columns(rows)
    expected = clones(p)
    alphas = [ALPHA] * len(p)
    wanted = OPERATORS.dampen_(expected, f, r, alphas, [0.5] * len(p), 1.0, 1.0, 0.1)
    assert torch.equal(streamed(p, f, r, alphas, piece)[:, :3], wanted[:, :3]) and same(p, expected)
    count = -(-541 // piece)
    log = Recorded.log
    assert log.count("wait_event") == 2 * count and log.count("synchronize") == count + 2
    assert log[-3:] == ["record", "synchronize", "synchronize"]  # the last use is noted, and both lanes waited for


# Through dampen_: a device that is no GPU stands for one


@pytest.fixture
def streams(monkeypatch):
    """Every dampening goes through pieces of 100 elements."""

    def in_pieces(params, f, r, alphas, lams, *rest):
        def dampen(indices, *tensors):
            own = [[values[i] for i in indices] for values in (alphas, lams)]
            return OPERATORS.dampen_(*tensors, *own, *rest)

        return dampen_streamed_([Entry("", *row) for row in zip(params, f, r, strict=True)], dampen)

    names = ("dampen_record", "dampen_undo_")
    others = {name: getattr(OPERATORS, name) for name in names}
    monkeypatch.setattr(torch.ops, "unlearn_fast", SimpleNamespace(dampen_=in_pieces, **others))
    monkeypatch.setattr(stream, "PIECE", 100)


def test_reports_and_undoing(streams):
    params, f, r = columns([triple(n, seed=n) for n in (0, 99, 100, 101, 1000)])
    before, plain = clones(params), clones(params)
    wanted = torch.ops.unlearn_fast.dampen_(plain, f, r, [ALPHA] * 5, [1.0] * 5, 1.0, 1.0, 0.0)
    report = dampen_(params, f, r, alpha=ALPHA, undo=True)
    assert same(params, plain)
    assert report.total.selected == wanted[:, 0].sum() and report.names == tuple("01234")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undo_(report.undo)
    assert same(params, before)


def test_an_interruption_between_pieces_can_be_undone(streams, monkeypatch):
    """Of the pieces of a parameter that is not contiguous, none has been written then; of another's, some."""
    params = [torch.full((60, 20), 8.0)[::2], torch.full((600,), 8.0)]
    f, r = [torch.full(p.shape, 4.0) for p in params], [torch.ones(p.shape) for p in params]
    versions = [p._version for p in params]
    bring, turns, log = Lane.bring, [], module.UndoLog()

    def interrupted(lane, importances):
        turns.append(1)
        if len(turns) == 9:
            raise KeyboardInterrupt
        return bring(lane, importances)

    monkeypatch.setattr(Lane, "bring", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dampen_(params, f, r, alpha=ALPHA, undo=log)
    assert params[0].eq(8).all() and params[1].eq(2).sum() == 200 and log.names == ("0", "1")
    assert [p._version for p in params] == [version + 1 for version in versions]  # autograd knows
    undo_(log)
    assert all(p.eq(8).all() for p in params)
