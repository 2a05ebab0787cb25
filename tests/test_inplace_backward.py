"""token_logprobs(inplace_backward=True): the same gradient in the logits' memory, or an error."""

import pytest
import torch
from accuracy import bits, leaf
from layouts import DTYPES, lay_out, surroundings
from torch import Tensor
from torch.nn import functional

from unlearn_fast import token_logprobs

B, T, V = 3, 6, 5
IGNORE = -100


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A leaf before the logits, labels, one of them ignored, and cotangents."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, V, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (B, T), generator=generator)
    labels[1, 2] = IGNORE
    return x, labels, torch.randn(B, T, generator=generator)


def gradient(make_logits, x: Tensor, labels: Tensor, grad: Tensor, **options) -> Tensor:
    logp = token_logprobs(make_logits(x), labels, **options)
    return torch.autograd.grad(logp, x, grad.to(logp.dtype))[0]


class SavesItsResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


SAFE = {
    "linear layer": lambda x: functional.linear(x, torch.eye(V) * 2),
    "softcap": lambda x: 3 * torch.tanh(x / 3),
    "scaled in place": lambda x: (x * 1).mul_(0.5),
    "layer norm": lambda x: functional.layer_norm(x, (V,)),
    "gelu": functional.gelu,
    "contiguous": lambda x: (x * 1).contiguous(),
    "reshaped": lambda x: (x.reshape(-1, V) * 1).view(B, T, V),
    "leading axes swapped": lambda x: (x.transpose(0, 1) * 1).contiguous().transpose(0, 1),
    "first of more rows": lambda x: torch.cat([x, x], 1)[:, :T],
    "middle of more columns": lambda x: torch.cat([x, x, x], -1)[..., 3 : 3 + V],
    "float32 of bfloat16": lambda x: x.bfloat16().float(),
}
REFUSED = {
    "leaf": (lambda x: x, "logits, a leaf"),
    "view of a leaf": (lambda x: x.view(B, T, V), "view of, a leaf"),
    "slice of a leaf": (lambda x: x[:, :T], "view of, a leaf"),
    "identity dropout": (lambda x: functional.dropout(x, 0.5, training=False), "a leaf"),
    "tanh": (torch.tanh, "TanhBackward0 still needs"),
    "tanh in place": (lambda x: (x * 1).tanh_(), "TanhBackward0 still needs"),
    "exp": (torch.exp, "ExpBackward0 still needs"),
    "relu": (torch.relu, "ReluBackward0 still needs"),
    "sigmoid": (torch.sigmoid, "SigmoidBackward0 still needs"),
    "log_softmax": (lambda x: x.log_softmax(-1), "LogSoftmaxBackward0 still needs"),
    "slice of a tanh": (lambda x: torch.tanh(torch.cat([x, x], 1))[:, :T], "TanhBackward0 still needs"),
    "reshaped tanh": (lambda x: torch.tanh(x.reshape(-1, V)).view(B, T, V), "TanhBackward0 still needs"),
    "custom function": (SavesItsResult.apply, "SavesItsResultBackward still needs"),
    "expanded": (lambda x: (x[:1] * 1).expand(B, T, V), "no overlapping"),
    "last axis strided": (lambda x: (x.transpose(1, 2) * 1).contiguous().transpose(1, 2), "stride 1 on the last axis"),
}


@pytest.mark.parametrize("make_logits", SAFE.values(), ids=SAFE)
def test_same_gradient(make_logits):
    inputs = make_inputs()
    expected = gradient(make_logits, *inputs)
    assert torch.equal(bits(gradient(make_logits, *inputs, inplace_backward=True)), bits(expected))


@pytest.mark.parametrize(("make_logits", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_where_the_logits_could_still_be_needed(make_logits, message):
    x, labels, _ = make_inputs()
    before = x.detach().clone()
    with pytest.raises(ValueError, match=f"(?s)inplace_backward.*{message}"):
        token_logprobs(make_logits(x), labels, inplace_backward=True)
    assert torch.equal(x, before)
    token_logprobs(make_logits(x), labels).sum().backward()  # without it, all of these work


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_takes_the_logits_memory(dtype):
    x, labels, grad = make_inputs(dtype)
    logits = x * 1
    expected = gradient(lambda x: x * 1, x, labels, grad)
    logp = token_logprobs(logits, labels, inplace_backward=True)
    version = logits._version
    (result,) = torch.autograd.grad(logp, logits, grad.to(logp.dtype))
    assert result.data_ptr() == logits.data_ptr()
    assert torch.equal(bits(logits), bits(expected)) and torch.equal(bits(result), bits(expected))
    assert logits._version > version


@pytest.mark.parametrize("layout", ["contiguous", "inside a larger tensor", "without the last position"])
def test_nothing_but_the_logits_is_written(layout):
    x, labels, grad = make_inputs()
    expected = gradient(lambda x: x * 1, x, labels, grad)
    place = lay_out(x.detach(), layout)
    guards = surroundings(place)
    stats = torch.ops.unlearn_fast.token_logprobs(place, labels, IGNORE, 0.0, 1.0, False)[:4]
    torch.ops.unlearn_fast.token_logprobs_backward_(grad, None, None, None, place, labels, *stats, IGNORE, 0.0, 1.0)
    assert torch.equal(bits(place), bits(expected)) and torch.equal(surroundings(place), guards)


def test_the_last_position_need_not_be_copied():
    """`logits[:, :-1]`: the gradient takes its memory, and the last position gets a zero gradient."""
    x, labels, grad = make_inputs()
    logits = x * 1
    expected = gradient(lambda x: (x * 1)[:, :-1], x, labels[:, 1:], grad[:, 1:])
    last = logits.detach()[:, -1].clone()
    logp = token_logprobs(logits[:, :-1], labels[:, 1:], inplace_backward=True)
    (result,) = torch.autograd.grad(logp, x, grad[:, 1:])
    assert torch.equal(result, expected) and (result[:, -1] == 0).all()
    assert torch.equal(logits[:, :-1], expected[:, :-1]) and torch.equal(logits[:, -1], last)


def test_a_second_backward_raises():
    x, labels, _ = make_inputs()
    loss = token_logprobs(x * 1, labels, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    with pytest.raises(RuntimeError, match="the logits were overwritten by an earlier backward"):
        loss.backward()
    assert torch.equal(x.grad, first)


def test_a_second_derivative_raises():
    x, labels, _ = make_inputs()
    with pytest.raises(NotImplementedError, match="inplace_backward cannot be differentiated twice"):
        torch.autograd.grad(token_logprobs(x * 1, labels, inplace_backward=True).sum(), x, create_graph=True)


def test_logits_changed_before_the_backward_raise():
    x, labels, _ = make_inputs()
    logits = x * 1
    loss = token_logprobs(logits, labels, inplace_backward=True).sum()
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_use_of_the_logits_gets_its_values_or_an_error():
    """Autograd runs the later use first: that one is served, an earlier one must notice that its logits are gone."""
    x, labels, _ = make_inputs()
    expected = torch.autograd.grad(token_logprobs(x, labels).sum() + x.square().sum(), x)[0]
    logits = x * 1
    logp = token_logprobs(logits, labels, inplace_backward=True)
    later = logits.square().sum()
    torch.testing.assert_close(torch.autograd.grad(logp.sum() + later, x)[0], expected, rtol=1e-6, atol=1e-6)
    logits = x * 1
    earlier = logits.square().sum()
    logp = token_logprobs(logits, labels, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp.sum() + earlier, x)


@pytest.mark.parametrize("second", [slice(0, 2), slice(1, 3)], ids=["same rows", "other rows"])
def test_two_calls_on_one_tensor_raise_rather_than_mix(second):
    x, labels, _ = make_inputs()
    logits = x * 1
    a = token_logprobs(logits[0:2], labels[0:2], inplace_backward=True)
    b = token_logprobs(logits[second], labels[second], inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(a.sum() + b.sum(), x)


def test_gradients_of_two_leaves_are_not_one_tensor():
    """The gradient of a sum goes to both terms: changing one .grad must not change the other."""
    a, b = leaf(torch.ones(2, 3)), leaf(torch.ones(2, 3))
    token_logprobs(a + b, torch.tensor([0, 1]), inplace_backward=True).sum().backward()
    before = b.grad.clone()
    a.grad.zero_()
    assert torch.equal(b.grad, before)


def test_without_gradients_it_changes_nothing():
    x, labels, _ = make_inputs()
    expected = token_logprobs(x, labels).detach()
    with torch.no_grad():
        assert torch.equal(token_logprobs(x, labels, inplace_backward=True), expected)
    with torch.inference_mode():
        assert torch.equal(token_logprobs(x * 1, labels, inplace_backward=True), expected)
    assert torch.equal(token_logprobs(x.detach(), labels, inplace_backward=True), expected)


def test_under_checkpointing():
    x, labels, grad = make_inputs()
    expected = gradient(lambda x: x * 2, x, labels, grad)

    def block(x: Tensor) -> Tensor:
        return token_logprobs(x * 2, labels, inplace_backward=True)

    logp = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(logp, x, grad)[0], expected)
