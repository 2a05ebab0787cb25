"""FLAT against the released code's numbers, the specification in float64, and hostile inputs."""

import copy
import itertools
import math
import pickle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unlearn_fast.losses import FLATLoss, flat_forget_loss, flat_loss, flat_template_loss, linear_flat_loss
from unlearn_fast.losses.divergences import PAPER
from unlearn_fast.reference import flat as reference

GOLDEN = load_file(Path(__file__).parent / "data" / "flat_official.safetensors")
FORMS = list(itertools.product(PAPER, ("paper", "official")))
IGNORE = -100

every_form = pytest.mark.parametrize(("divergence", "formulation"), FORMS)
pytestmark = pytest.mark.filterwarnings("ignore:formulation='official':UserWarning")


class Pair(NamedTuple):
    """Both sides' logits (or hidden states) and labels, in the argument order of the losses."""

    template: Tensor
    template_labels: Tensor
    forget: Tensor
    forget_labels: Tensor


def make_labels(lengths: list[int], T: int, V: int, seed: int) -> Tensor:
    """Labels of a random prompt (ignored), `lengths[b]` answer tokens, and padding (ignored)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((len(lengths), T), IGNORE)
    for row, n in zip(labels, lengths, strict=True):
        start = 1 + int(torch.randint(T - n, (), generator=generator))
        row[start : start + n] = torch.randint(V, (n,), generator=generator)
    return labels


def make_pair(dtype: torch.dtype = torch.float64, V: int = 37, scale: float = 2.0, seed: int = 0) -> Pair:
    """Three questions, uneven answers, one template answer of a single token and one forget answer of none."""
    generator = torch.Generator().manual_seed(seed)
    template_labels, forget_labels = make_labels([4, 1, 6], 9, V, seed), make_labels([5, 3, 0], 7, V, seed + 1)
    template, forget = (torch.randn(3, T, V, generator=generator, dtype=torch.float64) * scale for T in (9, 7))
    return Pair(template.to(dtype), template_labels, forget.to(dtype), forget_labels)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def with_grads(loss_function, pair: Pair, **options) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients for both sides' values."""
    template, forget = leaf(pair.template), leaf(pair.forget)
    loss = loss_function(template, pair.template_labels, forget, pair.forget_labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, (template, forget))


def double(pair: Pair) -> Pair:
    return pair._replace(template=pair.template.double(), forget=pair.forget.double())


# The released code


@pytest.mark.parametrize("divergence", PAPER)
@pytest.mark.parametrize("loss_function", [flat_loss, reference.flat_loss], ids=["ours", "reference"])
def test_official_form_gives_the_released_numbers(loss_function, divergence):
    pair = Pair(*(GOLDEN[name] for name in ("template_logits", "template_labels", "forget_logits", "forget_labels")))
    released = "jenson_shannon" if divergence == "jensen_shannon" else divergence
    expected = [GOLDEN[f"{released}.{name}"] for name in ("loss", "grad_template", "grad_forget")]
    if divergence == "jensen_shannon":  # the released code subtracts log 2 twice, rounded to float32: 3.8e-9 too much
        expected[0] = expected[0] + 2 * (torch.log(torch.tensor(2.0)).double() - math.log(2))
    loss, *grads = with_grads(loss_function, pair, divergence=divergence, formulation="official")
    torch.testing.assert_close(loss.reshape(1), expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected[1:], rtol=1e-12, atol=1e-12)
    # 1e-12 must mean something: the gradients are far larger
    assert min(g.abs().max() for g in grads) > 1e-4


# Against the specification


@every_form
def test_float64_matches_reference(divergence, formulation):
    pair, options = make_pair(), {"divergence": divergence, "formulation": formulation}
    actual, expected = (with_grads(f, pair, **options) for f in (flat_loss, reference.flat_loss))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert actual[0].dtype == torch.float64 and actual[0].shape == ()


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_low_precision_rounds_once(divergence, formulation, dtype):
    pair, options = make_pair(dtype), {"divergence": divergence, "formulation": formulation}
    loss, *grads = with_grads(flat_loss, pair, **options)
    expected_loss, *expected_grads = with_grads(reference.flat_loss, double(pair), **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=1e-6)
    info = torch.finfo(dtype)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        # one rounding to dtype (half a unit in the last place, also among subnormals), plus float32 arithmetic
        bound = expected.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2
        bound += 4e-6 * expected.abs().amax(-1, keepdim=True)
        assert ((grad.double() - expected).abs() <= bound).all()


@every_form
def test_gradcheck(divergence, formulation):
    labels = torch.tensor([[-100, 3, 1, -100], [2, -100, 0, 4]])
    forget_labels = torch.tensor([[1, 0, 2], [-100, -100, -100]])
    generator = torch.Generator().manual_seed(3)
    template, forget = (torch.randn(2, T, 5, generator=generator, dtype=torch.float64) for T in (4, 3))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return flat_loss(a, labels, b, forget_labels, divergence=divergence, formulation=formulation)

    assert torch.autograd.gradcheck(loss, (leaf(template), leaf(forget)))


@every_form
def test_linear_form_equals_logits_form(divergence, formulation):
    hidden = make_pair(V=6)
    pair = hidden._replace(template_labels=make_pair().template_labels, forget_labels=make_pair().forget_labels)
    options = {"divergence": divergence, "formulation": formulation}
    generator = torch.Generator().manual_seed(5)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((37, 6), (37,)))
    results = []
    for function in (linear_flat_loss, reference.linear_flat_loss):
        w, b = leaf(weight), leaf(bias)
        loss, *grads = with_grads(lambda *args, f=function, w=w, b=b: f(*args, w, bias=b, **options), pair)
        loss_again = function(*pair, w, bias=b, **options)
        results.append((loss, *grads, *torch.autograd.grad(loss_again, (w, b))))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)
    # two rows at a time
    torch.testing.assert_close(
        linear_flat_loss(*pair, weight, chunk_bytes=2 * 37 * 8, **options),
        flat_loss(pair[0] @ weight.T, pair[1], pair[2] @ weight.T, pair[3], **options),
        rtol=1e-12,
        atol=1e-14,
    )


@every_form
def test_sides_add_up_exactly(divergence, formulation):
    pair, options = make_pair(torch.float32), {"divergence": divergence, "formulation": formulation}
    together = with_grads(flat_loss, pair, **options)
    apart = []
    for function, logits, labels in ((flat_template_loss, *pair[:2]), (flat_forget_loss, *pair[2:])):
        logits = leaf(logits)
        loss = function(logits, labels, **options)
        apart.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    (template, template_grad), (forget, forget_grad) = apart
    for actual, expected in zip((template + forget, template_grad, forget_grad), together, strict=True):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(template, reference.flat_template_loss(*pair[:2], **options))
    torch.testing.assert_close(forget, reference.flat_forget_loss(*pair[2:], **options))


@every_form
def test_inplace_backward_gives_the_same(divergence, formulation):
    pair, options = make_pair(torch.float32), {"divergence": divergence, "formulation": formulation}
    expected = with_grads(flat_loss, pair, **options)
    leaves = leaf(pair.template), leaf(pair.forget)
    logits = [x * 1 for x in leaves]  # a leaf itself may not be overwritten
    sides = logits[0], pair.template_labels, logits[1], pair.forget_labels
    loss = flat_loss(*sides, inplace_backward=True, **options)
    torch.testing.assert_close((loss, *torch.autograd.grad(loss, leaves)), expected, rtol=0, atol=0)


# Padding, micro-batches, answers without tokens


def pad(pair: Pair, left: int, right: int) -> Pair:
    """Adds ignored positions, whose logits are garbage, on both ends."""
    values = [torch.nn.functional.pad(x, (0, 0, left, right), value=1e4) for x in (pair.template, pair.forget)]
    labels = [
        torch.nn.functional.pad(y, (left, right), value=IGNORE) for y in (pair.template_labels, pair.forget_labels)
    ]
    return Pair(values[0], labels[0], values[1], labels[1])


@pytest.mark.parametrize("divergence", PAPER)
def test_padding(divergence):
    pair = make_pair()
    loss, template_grad, forget_grad = with_grads(flat_loss, pair, divergence=divergence)
    padded_loss, *padded_grads = with_grads(flat_loss, pad(pair, 2, 3), divergence=divergence)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-14, atol=0)
    for padded, grad in zip(padded_grads, (template_grad, forget_grad), strict=True):
        torch.testing.assert_close(padded[:, 2:-3], grad, rtol=1e-13, atol=1e-17)
        assert padded[:, :2].count_nonzero() == 0 and padded[:, -3:].count_nonzero() == 0
    # the released form averages over the padding too
    official, padded_official = (
        flat_loss(*p, divergence=divergence, formulation="official") for p in (pair, pad(pair, 2, 3))
    )
    assert abs(official - padded_official) > 1e-4


@pytest.mark.parametrize("divergence", PAPER)
@pytest.mark.parametrize("sizes", [[1, 1, 1], [1, 2]], ids=str)
def test_micro_batches(divergence, sizes):
    pair = make_pair()
    loss, *grads = with_grads(flat_loss, pair, divergence=divergence)
    losses, *side_grads = [], [], []
    for part in zip(*(x.split(sizes) for x in pair), strict=True):
        results = with_grads(flat_loss, Pair(*part), divergence=divergence)
        weight = len(part[0]) / sum(sizes)
        for collected, result in zip((losses, *side_grads), results, strict=True):
            collected.append(weight * result)
    torch.testing.assert_close(sum(losses), loss, rtol=1e-14, atol=1e-16)
    for parts, grad in zip(side_grads, grads, strict=True):
        torch.testing.assert_close(torch.cat(parts), grad, rtol=1e-13, atol=1e-18)


@pytest.mark.parametrize("divergence", PAPER)
def test_a_sequence_without_tokens_adds_zero(divergence):
    """Also where the term of probability 0 is not 0, as in kl."""
    _, _, forget, labels = make_pair()
    assert (labels[2] == IGNORE).all()
    loss, others = (flat_forget_loss(forget[:n], labels[:n], divergence=divergence) for n in (3, 2))
    torch.testing.assert_close(loss * 3, others * 2, rtol=1e-14, atol=1e-16)


EMPTY = {
    "all ignored": (2, 4, [[IGNORE] * 4] * 2),
    "only the first token": (2, 3, [[1, IGNORE, IGNORE]] * 2),
    "T = 1": (3, 1, [[0], [1], [2]]),
    "T = 0": (2, 0, [[], []]),
    "B = 0": (0, 4, []),
}


@every_form
@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("module", ["ours", "reference"])
def test_nothing_to_predict(module, case, divergence, formulation):
    B, T, rows = EMPTY[case]
    labels = torch.tensor(rows, dtype=torch.long).reshape(B, T)
    pair = Pair(torch.randn(B, T, 5), labels, torch.randn(B, T, 5), labels)
    function = flat_loss if module == "ours" else reference.flat_loss
    loss, *grads = with_grads(function, pair, divergence=divergence, formulation=formulation)
    assert loss == 0
    assert all(torch.equal(g, torch.zeros(B, T, 5)) for g in grads)


@every_form
def test_linear_form_with_nothing_to_predict(divergence, formulation):
    labels = torch.full((2, 3), IGNORE)
    hidden, weight = leaf(torch.randn(2, 3, 4)), leaf(torch.randn(7, 4))
    loss = linear_flat_loss(hidden, labels, hidden, labels, weight, divergence=divergence, formulation=formulation)
    assert loss == 0
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(loss, (hidden, weight)))


@every_form
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
def test_ignored_positions_may_hold_anything(divergence, formulation, poison):
    pair, options = make_pair(torch.float32), {"divergence": divergence, "formulation": formulation}
    expected = with_grads(flat_loss, pair, **options)
    poisoned = []
    for logits, labels in (pair[:2], pair[2:]):
        ignored = torch.nn.functional.pad(labels[:, 1:] == IGNORE, (0, 1), value=True)
        poisoned += [logits.masked_fill(ignored.unsqueeze(-1), poison), labels]
    for actual, clean in zip(with_grads(flat_loss, Pair(*poisoned), **options), expected, strict=True):
        assert torch.equal(actual, clean)


# Inputs of other kinds


@every_form
def test_huge_logits_stay_finite(divergence, formulation):
    pair = make_pair(torch.float32, scale=1e4)
    for result in with_grads(flat_loss, pair, divergence=divergence, formulation=formulation):
        assert result.isfinite().all()


def test_int32_labels_other_ignore_index_and_strided_logits():
    pair = make_pair(torch.float32)
    expected = with_grads(flat_loss, pair)
    labels = [y.masked_fill(y == IGNORE, -1).int() for y in (pair.template_labels, pair.forget_labels)]
    strided = [torch.stack([x, -x], 1)[:, 0] for x in (pair.template, pair.forget)]
    assert not strided[0].is_contiguous()
    other = Pair(strided[0], labels[0], strided[1], labels[1])
    torch.testing.assert_close(with_grads(flat_loss, other, ignore_index=-1), expected, rtol=1e-6, atol=1e-9)


def test_labels_are_not_modified():
    pair = make_pair()
    before = copy.deepcopy(pair)
    flat_loss(*pair)
    linear_flat_loss(*pair, torch.randn(37, 37, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(pair, before, strict=True))


def test_default_is_total_variation_of_the_paper():
    pair = make_pair()
    assert flat_loss(*pair) == flat_loss(*pair, divergence="total_variation", formulation="paper")
    assert FLATLoss()(*pair) == flat_loss(*pair)


def test_module():
    pair, options = make_pair(), {"divergence": "kl", "formulation": "official", "ignore_index": -1}
    pair = Pair(*(x if x.is_floating_point() else x.masked_fill(x == IGNORE, -1) for x in pair))
    module = FLATLoss(**options, inplace_backward=True)
    assert torch.equal(module(*pair), flat_loss(*pair, **options))
    assert torch.equal(pickle.loads(pickle.dumps(module))(*pair), flat_loss(*pair, **options))
    assert repr(module) == (
        "FLATLoss(divergence='kl', formulation='official', ignore_index=-1, softcap=None, temperature=1.0,"
        " inplace_backward=True)"
    )
    assert not list(module.parameters())


@pytest.mark.parametrize(
    ("divergence", "formulation"), [("total_variation", "paper"), ("neyman", "official"), ("kl", "paper")]
)
def test_compiles_without_graph_breaks(divergence, formulation):
    pair, options = make_pair(torch.float32), {"divergence": divergence, "formulation": formulation}
    compiled = torch.compile(flat_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_grads(compiled, pair, **options), with_grads(flat_loss, pair, **options))


def test_compiled_module_and_linear_form():
    pair = make_pair(torch.float32)
    module = torch.compile(FLATLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_grads(module, pair), with_grads(flat_loss, pair))
    weight = torch.randn(50, 37)
    linear = torch.compile(linear_flat_loss, backend="aot_eager")
    expected = with_grads(lambda *args: linear_flat_loss(*args, weight), pair)
    torch.testing.assert_close(with_grads(lambda *args: linear(*args, weight), pair), expected)
