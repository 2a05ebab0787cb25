"""The engine of the linear forms: work, memory, and gradients that are computed before the backward."""

import functools
import itertools
import math

import pytest
import torch
from sequence_losses import IGNORE, LOSSES, Loss, hidden_inputs, leaves, linear_loss, make_labels, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import unlearn_fast
from unlearn_fast import reference
from unlearn_fast.ops import _chunks

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
NPO, DPO = (next(x for x in LOSSES if x.name == name) for name in ("npo_loss", "dpo_loss"))
FLAT, OFFICIAL = (x for x in LOSSES if x.name == "flat_loss")
ours = functools.partial(linear_loss, unlearn_fast)


def rows(loss: Loss, inputs: dict) -> int:
    """The labelled ones: no others enter the products on the CPU."""
    return sum(int((inputs[f"{p}labels"][:, 1:] != IGNORE).sum()) for p in loss.sides)


def backward(loss: Loss, inputs: dict, **options) -> None:
    ours(loss, inputs, **options).backward()


# Work


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@every_loss
@pytest.mark.parametrize("chunk_rows", [12, 1000])
def test_floating_point_operations(loss, chunk_rows):
    """6 N H V; 4 N H V where a side is frozen; 2 N H V without gradients. A teacher's logits come on top."""
    inputs, options = hidden_inputs(loss), {"chunk_bytes": chunk_rows * 37 * 8 * (1 + loss.teacher)}
    product = 2 * rows(loss, inputs) * 37 * 6
    teacher = 2 * rows(loss, inputs) * 37 * 5 if loss.teacher else 0
    assert flops(lambda: backward(loss, leaves(inputs), **options)) == 3 * product + teacher
    assert flops(lambda: backward(loss, leaves(inputs, ("weight",)), **options)) == 2 * product + teacher
    frozen = tuple(f"{p}hidden" for p in loss.sides)
    assert flops(lambda: backward(loss, leaves(inputs, frozen), **options)) == 2 * product + teacher
    with torch.no_grad():
        assert flops(lambda: ours(loss, leaves(inputs), **options)) == product + teacher
    assert flops(lambda: ours(loss, inputs, **options)) == product + teacher


def one_sequence(loss: Loss) -> dict:
    """Of each side, with six labelled tokens."""
    inputs = hidden_inputs(loss)
    for prefix in loss.sides:
        inputs[f"{prefix}labels"] = make_labels(prefix, 37, torch.Generator(), [6])
        inputs[f"{prefix}hidden"] = inputs[f"{prefix}hidden"][:1]
    return inputs | {name: inputs[name][:1] for name in loss.constants}


@pytest.mark.parametrize(
    ("loss", "twice"),
    [(x, {"npo_loss": 4, "simnpo_loss": 4, "dpo_loss": 10}.get(x.name, 8 if x is FLAT else 0)) for x in LOSSES],
    ids=lambda x: getattr(x, "title", None),
)
def test_a_sequence_in_pieces(loss, twice):
    """Pieces of two rows. All but the last are computed twice where a row's gradient needs the sequence's value, which
    is of both sides for DPO, and of one for FLAT."""
    if loss.teacher:
        pytest.skip("a teacher's sequences have logits of their own besides")
    inputs = one_sequence(loss)
    count = flops(lambda: backward(loss, leaves(inputs), chunk_bytes=2 * 37 * 8))
    assert count == (3 * rows(loss, inputs) + twice) * 2 * 37 * 6


def test_the_logits_of_a_teacher_in_pieces_are_computed_once():
    loss = next(x for x in LOSSES if x.teacher)
    inputs = one_sequence(loss) | {"teacher_hidden": hidden_inputs(loss)["teacher_hidden"][:1]}
    count = flops(lambda: backward(loss, leaves(inputs), chunk_bytes=2 * 37 * 16))
    assert count == 6 * 2 * 37 * (3 * 6 + 5)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({"chunk_bytes": 999}, 9),
        ({"chunk_bytes": 1}, 1),
        ({"N": 2048}, 128),  # a sixteenth
        ({"N": 16_000}, 1000),
        ({"N": 100}, 128),  # the least that products run well with
        ({"N": 2048, "together": 300}, 300),  # a sequence as a whole
        ({"N": 2048, "row_bytes": 1 << 20}, 64),  # 64 MiB
        ({"N": 1, "row_bytes": 1 << 30}, 1),
        ({"N": 1 << 20, "row_bytes": 1 << 10, "device": "cuda"}, 768 << 10),
    ],
)
def test_rows_a_chunk(given, rows):
    given = {"chunk_bytes": None, "row_bytes": 100, "N": 0, "device": "cpu"} | given
    assert _chunks.rows_a_chunk(**given | {"device": torch.device(given["device"])}) == rows


# Memory


class Allocations(TorchDispatchMode):
    """The sizes in bytes of all memory that appears."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.sizes[storage.data_ptr()] = max(storage.nbytes(), self.sizes.get(storage.data_ptr(), 0))
        return out


@pytest.mark.parametrize("loss", [x for x in LOSSES if not x.teacher], ids=lambda loss: loss.title)
@pytest.mark.parametrize("chunk_rows", [7, 12])
def test_the_logits_never_exist(loss, chunk_rows):
    """V = 5000, H = 6: a row of logits is as large as the hidden states of 833."""
    inputs = leaves(hidden_inputs(loss, torch.float32, V=5000))
    with Allocations() as seen:
        backward(loss, inputs, chunk_bytes=chunk_rows * 5000 * 4)
    known = {x.untyped_storage().data_ptr() for x in inputs.values()}
    weight = inputs["weight"].nbytes
    made = sorted((n for pointer, n in seen.sizes.items() if pointer not in known), reverse=True)
    assert made[0] <= max(chunk_rows * 5000 * 4, weight)
    # one gradient of the weight and one buffer (the released form: of each side), and no other of half their size
    assert sum(n >= 4 * 5000 * 4 for n in made) <= (5 if loss is OFFICIAL else 2)


def test_the_buffer_is_no_larger_than_the_labelled_rows():
    inputs = hidden_inputs(NPO, torch.float32, V=5000)
    with torch.no_grad(), Allocations() as seen:
        ours(NPO, inputs)
    known = {x.untyped_storage().data_ptr() for x in inputs.values()}
    assert max(n for p, n in seen.sizes.items() if p not in known) == rows(NPO, inputs) * 5000 * 4


# Gradients


@every_loss
@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_any_frozen_tensors(loss, chunk_rows):
    inputs, options = hidden_inputs(loss), {"chunk_bytes": chunk_rows * 37 * 8}
    every = with_gradients(functools.partial(ours, loss), inputs, **options)
    names = [n for n in every if n != "value"]
    for frozen in itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(1, len(names))):
        own = leaves(inputs, frozen)
        value = ours(loss, own, **options)
        kept = [n for n in names if n not in frozen]
        gradients = torch.autograd.grad(value, [own[n] for n in kept])
        for name, gradient in zip(kept, gradients, strict=True):
            torch.testing.assert_close(gradient, every[name], rtol=1e-12, atol=1e-15)
        assert torch.equal(value, every["value"])


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_factor_from_upstream(loss, dtype):
    """3 * loss + another loss on the same tensors."""
    inputs = hidden_inputs(loss, dtype)

    def total(own, library):
        other = own["weight"].square().sum() + sum(own[f"{p}hidden"].square().sum() for p in loss.sides)
        return linear_loss(library, loss, own) * 3 + other

    results, exact = (with_gradients(functools.partial(total, library=x), inputs) for x in (unlearn_fast, reference))
    for name, result in results.items():
        size = float(exact[name].abs().max())
        torch.testing.assert_close(result, exact[name], rtol=0, atol=16 * torch.finfo(dtype).eps * size)


def test_micro_batches_accumulate():
    """Two backwards into the same .grad."""
    own, again = (leaves(hidden_inputs(FLAT)) for _ in range(2))
    sequences = ("template_hidden", "template_labels", "forget_hidden", "forget_labels")
    for part in (slice(0, 2), slice(2, 5)):
        micro = {n: x[part] if n in sequences else x for n, x in own.items()}
        (ours(FLAT, micro) * len(micro["forget_labels"]) / 5).backward()
    backward(FLAT, again)
    for name in ("template_hidden", "forget_hidden", "weight", "bias"):
        torch.testing.assert_close(own[name].grad, again[name].grad)


def test_a_second_backward_is_an_error():
    own = leaves(hidden_inputs(NPO))
    loss = ours(NPO, own)
    loss.backward(retain_graph=True)
    before = own["weight"].grad.clone()
    with pytest.raises(RuntimeError, match="a second backward through this loss"):
        loss.backward()
    assert torch.equal(own["weight"].grad, before)


def test_a_second_derivative_is_an_error():
    own = leaves(hidden_inputs(NPO))
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        torch.autograd.grad(ours(NPO, own), own["hidden"], create_graph=True)


def test_gradients_are_handed_over_without_a_copy():
    own = leaves(hidden_inputs(NPO))
    loss = ours(NPO, own)
    pointers = {g.data_ptr() for g in loss.grad_fn.gradients}
    loss.backward()
    assert own["weight"].grad.data_ptr() in pointers and own["hidden"].grad.data_ptr() in pointers


def test_confident_tokens_keep_their_gradient():
    """The other logits are 40 below the label's, and 1 - p = 4 exp(-40) shows in every gradient."""
    weight = torch.tensor([[0.0], [40.0], [0.0], [0.0], [0.0]], requires_grad=True)
    bias, hidden = torch.zeros(5, requires_grad=True), torch.ones(1, 2, 1, requires_grad=True)
    unlearn_fast.linear_gradient_ascent_loss(hidden, torch.tensor([[IGNORE, 1]]), weight, bias=bias).backward()
    k = 4 * math.exp(-40)
    assert bias.grad.tolist() == pytest.approx([-k / 4, k, -k / 4, -k / 4, -k / 4], rel=1e-6)
    assert weight.grad.flatten().tolist() == bias.grad.tolist()
    assert hidden.grad.flatten().tolist() == pytest.approx([40 * k, 0], rel=1e-6)


@every_loss
def test_inputs_are_not_changed(loss):
    inputs = hidden_inputs(loss)
    before = {n: x.clone() for n, x in inputs.items()}
    with_gradients(functools.partial(ours, loss), inputs, chunk_bytes=3 * 37 * 8)
    assert all(torch.equal(x, before[n]) for n, x in inputs.items())


def test_tied_and_strided_tensors():
    """The hidden states are a slice, the weight is transposed, and both sides are one tensor."""
    inputs = hidden_inputs(DPO)
    x = torch.randn(5, 10, 6, dtype=torch.float64)
    weight = torch.randn(6, 37, dtype=torch.float64)
    for library in (unlearn_fast, reference):
        x.grad = weight.grad = None
        x.requires_grad_(), weight.requires_grad_()
        sides = {"template_hidden": x[:, 1:8], "forget_hidden": x[:, :-1]}
        linear_loss(library, DPO, inputs | sides | {"weight": weight.T}).backward()
        if library is unlearn_fast:
            first = x.grad, weight.grad
    torch.testing.assert_close(first, (x.grad, weight.grad))


def test_runs_give_the_same_bits():
    inputs = hidden_inputs(FLAT, torch.float32, H=33, V=501)
    results = [with_gradients(functools.partial(ours, FLAT), inputs, chunk_bytes=30_000) for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_autocast_does_not_change_the_result():
    inputs = hidden_inputs(NPO, torch.float32)
    expected = with_gradients(functools.partial(ours, NPO), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = with_gradients(functools.partial(ours, NPO), inputs)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_sums_of_a_16_bit_weight(dtype):
    """Over many chunks, each of which adds a little of one sign, they lose less than sums in the weight's own dtype."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.rand(200, 2, 16, generator=g).to(dtype), torch.randn(50, 16, generator=g).to(dtype)
    labels, errors = torch.full((200, 2), 3), {}
    for accumulated in (torch.float64, None, torch.float32):
        wide = accumulated == torch.float64
        w = (weight.double() if wide else weight.clone()).requires_grad_()
        options = {} if wide else {"chunk_bytes": 1, "weight_grad_dtype": accumulated}
        unlearn_fast.linear_gradient_ascent_loss(hidden.to(w.dtype), labels, w, **options).backward()
        assert w.grad.dtype == w.dtype
        if wide:
            exact = w.grad
        else:
            errors[accumulated] = float((w.grad.double() - exact).norm() / exact.norm())
    assert errors[torch.float32] < 0.3 * errors[None] < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_blocks_of_the_vocabulary(dtype, bias, monkeypatch):
    """V = 37 is no multiple of a block."""
    inputs = hidden_inputs(FLAT, dtype)
    if not bias:
        del inputs["bias"]
    options = {"chunk_bytes": 5 * 37 * dtype.itemsize}
    expected = with_gradients(functools.partial(ours, FLAT), inputs, **options)
    monkeypatch.setattr("unlearn_fast.ops._chunks.LOGITS_BLOCK_BYTES", 5 * 8 * dtype.itemsize)
    monkeypatch.setattr("unlearn_fast.ops._chunks.GRADIENT_BLOCK", 10)
    results = with_gradients(functools.partial(ours, FLAT), inputs, **options)
    rtol = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(results, expected, rtol=rtol, atol=rtol * 0.1)


def test_a_product_larger_than_the_scratch(monkeypatch):
    monkeypatch.setattr("unlearn_fast.ops._chunks.SCRATCH_BYTES", 1000)
    inputs = hidden_inputs(FLAT, torch.bfloat16)
    options = {"chunk_bytes": 4 * 37 * 2}
    expected = with_gradients(functools.partial(ours, FLAT), inputs, weight_grad_dtype=torch.float32, **options)
    monkeypatch.undo()
    results = with_gradients(functools.partial(ours, FLAT), inputs, weight_grad_dtype=torch.float32, **options)
    torch.testing.assert_close(results, expected, rtol=1e-2, atol=1e-4)


# Where the rows of a chunk include ignored ones, as on GPUs


@every_loss
@pytest.mark.parametrize("chunk_rows", [3, 20, 1000])
def test_chunks_with_ignored_rows(loss, chunk_rows, monkeypatch):
    """The other selection of rows, which never asks the device what is labelled."""
    inputs, options = hidden_inputs(loss), {"chunk_bytes": chunk_rows * 37 * 8}
    expected = with_gradients(functools.partial(ours, loss), inputs)
    monkeypatch.setattr("unlearn_fast.ops._chunks.only_labelled_rows", lambda _: False)
    for prefix in loss.sides:
        next_labels = inputs[f"{prefix}labels"].roll(-1, 1)
        next_labels[:, -1] = IGNORE
        inputs[f"{prefix}hidden"][next_labels == IGNORE] = math.nan
    results = with_gradients(functools.partial(ours, loss), inputs, **options)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-11, atol=1e-14, msg=name)


# torch.compile


@pytest.mark.parametrize("loss", [NPO, DPO, OFFICIAL], ids=lambda loss: loss.title)
def test_a_compiled_training_step(loss):
    inputs = hidden_inputs(loss, torch.float32)
    body = torch.nn.Linear(6, 6)

    def step(own):
        hidden = {n: body(x).tanh() if n.endswith("hidden") else x for n, x in own.items()}
        loss_ = ours(loss, hidden, chunk_bytes=5 * 37 * 4) * 2
        loss_.backward()
        return loss_.detach()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        for _ in range(2):
            own = leaves(inputs)
            body.zero_grad()
            value = function(own)
        results.append([value, own["weight"].grad, body.weight.grad.clone()])
    torch.testing.assert_close(*results)
