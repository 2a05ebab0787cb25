"""Undoing a dampening: every bit, in every layout and dtype, after interruptions, and what it warns of."""

import warnings

import pytest
import torch
from accuracy import bits
from hypothesis import given
from hypothesis import strategies as st
from importances import ALPHA, SIZES, any_bits, clones, columns, many_tensors, same, selects_all, triple, triples
from layouts import DTYPES, surroundings
from torch import Tensor, nn

import unlearn_fast
from unlearn_fast import UndoLog, dampen_, undo_
from unlearn_fast.ops import dampen as module
from unlearn_fast.reference.dampen import dampen_record, dampen_undo_

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def nbytes(report: unlearn_fast.DampenReport, params: list[Tensor]) -> int:
    """What the documentation says: 2 bytes for a place and the value's own, and 8 for every 65,536 elements."""
    changed = sum(
        counts.selected * (2 + p.element_size()) for counts, p in zip(report.parameters.values(), params, strict=True)
    )
    return changed + sum(8 * -(-p.numel() // 65536) for p in params)


# Every bit


@given(rows=triples(), segment=st.sampled_from((1, 50, 1 << 26)))
def test_any_shapes_strides_and_dtypes(rows, segment):
    """The result is that without a log; afterwards all is as before, what lies between the elements included."""
    params, f, r = columns(rows)
    before, around = clones(params), [surroundings(p) for p in params]
    plain = clones(params)
    wanted = dampen_(plain, f, r, alpha=ALPHA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SEGMENT", segment)
        report = dampen_(params, f, r, alpha=ALPHA, undo=True)
    assert same(params, plain) and report.total.selected == report.undo.changed == wanted.total.selected
    assert torch.equal(report.stats[:, :3], wanted.stats[:, :3])
    assert report.undo.names == report.names
    undo_(report.undo)
    assert same(params, before)
    assert all(torch.equal(surroundings(p), rest) for p, rest in zip(params, around, strict=True))
    assert report.undo.names == () and report.undo.changed == report.undo.nbytes == 0


@every_dtype
def test_nan_payloads_and_signs_of_zero(dtype):
    p = any_bits((70_000,), dtype, torch.Generator().manual_seed(0))
    p[:2] = torch.tensor([0.0, -0.0])
    before = p.clone()
    report = dampen_([p], *selects_all(p), alpha=ALPHA, undo=True)
    assert report.total.selected == 70_000 and not same([p], [before])
    undo_(report.undo)
    assert same([p], [before])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("which", ["all", "none", "first", "last", "every 127th"])
def test_sizes_around_blocks_and_runs(n, which):
    p, f = any_bits((n,), torch.float32, torch.Generator().manual_seed(n)), torch.zeros(n)
    f[
        {"all": slice(None), "none": slice(0), "first": slice(1), "last": slice(-1, None)}.get(which, slice(0, n, 127))
    ] = 4
    before = p.clone()
    report = dampen_([p], [f], [torch.ones(n)], alpha=ALPHA, undo=True)
    assert report.undo.changed == report.total.selected == int((f > ALPHA).sum())
    assert report.undo.nbytes == nbytes(report, [p])
    undo_(report.undo)
    assert same([p], [before])


def test_hundreds_of_tensors_and_any_number_of_threads():
    threads, logs = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        params, f, r = columns(many_tensors())
        before = clones(params)
        report = dampen_(params, f, r, alpha=ALPHA, undo=True)
        logs.append((clones(params), [report.stats, *report.undo._segments[0].record]))
        assert report.undo.nbytes == nbytes(report, params)
        undo_(report.undo)
        assert same(params, before)
    torch.set_num_threads(threads)
    assert all(same(one, two) for one, two in zip(*logs, strict=True))


@given(rows=triples())
def test_records_equal_the_references(rows):
    """Those that the plain implementation, which serves other devices, would write; and it can undo ours."""
    params, f, r = columns(rows)
    before, alphas = clones(params), [ALPHA] * len(params)
    ours = torch.ops.unlearn_fast.dampen_record(params, f, r, alphas)
    assert all(torch.equal(a, b) for a, b in zip(ours, dampen_record(params, f, r, alphas), strict=True))
    dampen_(params, f, r, alpha=ALPHA)
    dampen_undo_(params, *ours)
    assert same(params, before)


def test_channels_last_parameters_inside_a_larger_tensor():
    p, f, r = triple((4, 3, 5, 2), hostile=False)
    place = torch.full((4, 6, 5, 4), 9.0).to(memory_format=torch.channels_last)
    before, p = p, place[:, ::2, :, 1:3].copy_(p)
    around = surroundings(p)
    report = dampen_([p], [f], [r], alpha=ALPHA, undo=True)
    assert report.total.selected > 0 and not same([p], [before]) and report.undo.nbytes == nbytes(report, [p])
    undo_(report.undo)
    assert same([p], [before]) and torch.equal(surroundings(p), around)


# Several dampenings, interruptions


@given(rows=triples(), seed=st.integers(0, 9))
def test_several_dampenings_are_undone_last_first(rows, seed):
    params, f, r = columns(rows)
    before, log = clones(params), UndoLog()
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed)).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in order:
            dampen_(params, f, r, alpha=float(k), lam=0.5 + k, cap=2.0, undo=log)
        undo_(log)
    assert same(params, before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_can_be_undone(when, monkeypatch):
    """In the second of three segments, before or after it has been written."""
    params = {name: torch.full((10,), k + 1.0) for k, name in enumerate("abcdef")}
    before, log, calls, apply_ = clones(list(params.values())), UndoLog(), [], module.apply_

    def interrupted(*arguments):
        calls.append(1)
        table = apply_(*arguments) if len(calls) == 1 or when == "after" else None
        if len(calls) == 2:
            raise KeyboardInterrupt
        return table

    monkeypatch.setattr(module, "apply_", interrupted)
    monkeypatch.setattr(module, "SEGMENT", 20)
    f, r = (dict(zip(params, side, strict=True)) for side in selects_all(*params.values()))
    with pytest.raises(KeyboardInterrupt):
        dampen_(params, f, r, alpha=ALPHA, undo=log)
    assert log.names == tuple("abcd") and log.changed == 40
    assert [bool((p == q).all()) for p, q in zip(params.values(), before, strict=True)] == [
        name not in ("ab" if when == "before" else "abcd") for name in params
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undo_(log)
    assert same(list(params.values()), before) and log.names == ()


def test_an_error_before_the_first_write_leaves_an_empty_log():
    p, log = torch.ones(3), UndoLog()
    with pytest.raises(ValueError, match="alpha is -1"):
        dampen_([p], *selects_all(p), alpha=-1.0, undo=log)
    assert log.names == () and p.eq(1).all()


# Parameters of every kind


def test_modules_with_tied_weights():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embedding"].weight
    before = clones(list(model.parameters()))
    f, r = ({n: torch.full_like(p, v) for n, p in model.named_parameters()} for v in (4.0, 1.0))
    report = dampen_(model, f, r, alpha=ALPHA, undo=True)
    assert report.undo.names == ("embedding.weight", "head.bias") and report.undo.changed == 16
    assert "16 values of 2 parameters" in repr(report.undo)
    undo_(report.undo)
    assert same(list(model.parameters()), before)
    assert model["head"].weight is model["embedding"].weight and model["head"].weight.requires_grad


def test_tensors_made_in_inference_mode():
    with torch.inference_mode():
        p = torch.full((3,), 8.0)
        report = dampen_([p], *selects_all(p), alpha=ALPHA, undo=True)
    assert p.eq(2).all()
    undo_(report.undo)
    assert p.eq(8).all()


def test_leaves_stay_leaves_and_autograd_notices():
    p = torch.ones(3, requires_grad=True)
    report = dampen_([p], *selects_all(p), alpha=ALPHA, undo=True)
    loss = (p**2).sum()
    version = p._version
    undo_(report.undo)
    assert p._version > version and p.is_leaf and p.grad_fn is None and p.eq(1).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("undo", ["yes", None, 1, []], ids=repr)
def test_undo_of_a_wrong_type(undo):
    p = torch.ones(3)
    with pytest.raises(TypeError, match=r"undo is a .*: it must be True, False or an UndoLog"):
        dampen_([p], *selects_all(p), alpha=ALPHA, undo=undo)
    assert p.eq(1).all()
    with pytest.raises(
        TypeError, match=r"log is a .*: it must be an UndoLog, which dampen_\(\.\.\., undo=True\) returns"
    ):
        undo_(undo)


def test_without_undo_the_report_has_no_log():
    p = torch.ones(3)
    assert dampen_([p], *selects_all(p), alpha=ALPHA).undo is None
    log = UndoLog()
    assert dampen_([p], *selects_all(p), alpha=ALPHA, undo=log).undo is log
    undo_(UndoLog())  # of nothing


def test_records_of_other_parameters_are_refused():
    p = torch.ones(70_000)
    record = torch.ops.unlearn_fast.dampen_record([p], *selects_all(p), [ALPHA])
    for other in ([p, p], [p[:10]], [p.double()], []):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.unlearn_fast.dampen_undo_(other, *record)


def test_compiled_as_one_graph():
    p, f, r = triple((7, 300), hostile=False)
    before = p.clone()

    def run(p: Tensor) -> Tensor:
        record = torch.ops.unlearn_fast.dampen_record([p], [f], [r], [ALPHA])
        torch.ops.unlearn_fast.dampen_([p], [f], [r], [ALPHA], [1.0], 1.0, 1.0, 0.0)
        changed = (bits(p) != bits(before)).sum()
        torch.ops.unlearn_fast.dampen_undo_([p], *record)
        return changed

    changed = torch.compile(run, fullgraph=True, backend="aot_eager")(p)
    assert changed > 0 and same([p], [before])
