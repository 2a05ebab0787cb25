"""The formulations that the operators replace: what people write in plain torch, and what released code does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, nll_loss, unfold
from torch.nn.grad import conv2d_weight


def eager_token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:  # [N, V], [N] -> [N] in at least float32
    """The whole log-softmax, of which one column a row is kept."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=dtype).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def gradient_of_logprobs(logits: Tensor, labels: Tensor, grad: Tensor, lse: Tensor) -> Tensor:
    """grad * (onehot(label) - softmax), in one pass where it is compiled."""
    own = torch.arange(logits.shape[1], device=logits.device) == labels.unsqueeze(1)
    p = (logits.to(lse.dtype) - lse.unsqueeze(1)).exp()
    return (grad.unsqueeze(1) * (own.to(p.dtype) - p)).to(logits.dtype)


def released_token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """The released FLAT code's form, torch's NLL of the whole softmax, which is -p; its logarithm on top."""
    return nll_loss(logits.softmax(-1), labels, reduction="none").neg().float().log()


def capped_token_logprobs(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    """The capped logits in full, then the same."""
    return eager_token_logprobs(softcap * torch.tanh(logits.float() / softcap), labels)


class LogpAndEntropy(NamedTuple):
    logp: Tensor
    entropy: Tensor


def eager_token_statistics(logits: Tensor, labels: Tensor) -> LogpAndEntropy:
    """The whole log-softmax, of which one column is kept, and the whole p log p."""
    logp = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return LogpAndEntropy(logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1))


def eager_token_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """torch's kl_div of two whole log-softmaxes."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p, q = (x.log_softmax(-1, dtype=dtype) for x in (logits, teacher_logits))
    return kl_div(p, q, reduction="none", log_target=True).sum(-1)


def eager_linear_token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # [N, H], [V, H], [N] -> [N]
    """All logits, then the whole log-softmax."""
    return eager_token_logprobs(linear(hidden, weight), labels)


def released_dampen_(
    p: Tensor, f: Tensor, r: Tensor, *, alpha: float, lam: float, exponent: float = 1.0, cap: float = 1.0
) -> None:
    """The released SSD code's order of operations: factors of all elements, then lists of the selected indices."""
    factor = ((r * lam) / f) ** exponent
    selected = torch.where(f > r * alpha)
    update = factor[selected]
    update[torch.where(update > cap)] = cap
    p[selected] = p[selected] * update


def where_dampen_(
    p: Tensor, f: Tensor, r: Tensor, *, alpha: float, lam: float, exponent: float = 1.0, cap: float = 1.0
) -> None:
    """The same values as one elementwise expression, which is the form that torch.compile fuses."""
    factor = (((r * lam) / f) ** exponent).clamp(max=cap)
    p.copy_(torch.where(f > r * alpha, p * factor, p))


def einsum_sum_grad_squared_(out: Tensor, inputs: Tensor, grad_outputs: Tensor) -> None:
    """Every example's gradient [B, O, I] at once, then its squares."""
    out += torch.einsum("bto,bti->boi", grad_outputs, inputs).square().sum(0)


def unique_sum_grad_squared_embedding_(out: Tensor, tokens: Tensor, grad_outputs: Tensor) -> None:
    """The distinct (example, token) pairs, one gradient row for each, then their squares into the table."""
    V = len(out)
    pairs = (tokens + V * torch.arange(len(tokens), device=tokens.device).unsqueeze(1)).flatten()
    distinct, index = pairs.unique(return_inverse=True)
    gradients = out.new_zeros(len(distinct), out.shape[1]).index_add_(
        0, index, grad_outputs.flatten(0, 1).to(out.dtype)
    )
    out.index_add_(0, distinct % V, gradients.square_())


def sorted_sum_grad_squared_embedding_(out: Tensor, tokens: Tensor, grad_outputs: Tensor) -> None:
    """The same with sizes that do not depend on the tokens, which torch.compile needs to keep one graph."""
    V, H = out.shape
    pairs, order = (tokens + V * torch.arange(len(tokens)).unsqueeze(1)).flatten().sort()
    new = torch.cat([pairs.new_zeros(1), (pairs[1:] != pairs[:-1]).long()])
    index = new.cumsum(0)
    rows = grad_outputs.reshape(-1, H)[order].to(out.dtype)
    gradients = out.new_zeros(len(pairs), H).index_add_(0, index, rows)
    words = torch.zeros_like(pairs).scatter_(0, index, pairs % V)  # unused gradients are 0, and are added to row 0
    out.index_add_(0, words, gradients.square())


def sum_square_sum_(out: Tensor, inputs: Tensor, grad_outputs: Tensor) -> None:
    """All products [B, T, C] at once."""
    out += (grad_outputs * inputs).sum(1).square().sum(0)


def einsum_product_of_squares_(out: Tensor, inputs: Tensor, grad_outputs: Tensor) -> None:
    """One position an example: the square of a product is the product of squares."""
    out += torch.einsum("bo,bi->oi", grad_outputs.square(), inputs.square())


def weight_gradient(inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    """The ordinary weight gradient: the same FLOPs, and no squares."""
    return torch.mm(grad_outputs.flatten(0, -2).T, inputs.flatten(0, -2))


def unfolded_sum_grad_squared_(out: Tensor, inputs: Tensor, grad_outputs: Tensor, stride: int, padding: int) -> None:
    """The convolution as a linear layer of unfolded patches, which are stored, and then as above."""
    patches = unfold(inputs, out.shape[2:], stride=stride, padding=padding)  # [B, C k k, T]
    gradients = torch.einsum("bot,bit->boi", grad_outputs.flatten(2), patches)
    out += gradients.square().sum(0).view_as(out)


def convolution_weight_gradient_(out: Tensor, inputs: Tensor, grad_outputs: Tensor, stride: int, padding: int) -> None:
    """The ordinary weight gradient: the same FLOPs, and no squares."""
    out.copy_(conv2d_weight(inputs, out.shape, grad_outputs, stride, padding))


def released_flat_loss(
    template_logits: Tensor,  # [B, T, V]
    template_labels: Tensor,  # [B, T]
    forget_logits: Tensor,  # [B, T', V]
    forget_labels: Tensor,  # [B, T']
) -> Tensor:  # []
    """The released FLAT code's order of operations: sequence by sequence, the softmax of all positions, then a mask."""
    template = mean_probability(template_logits[:, :-1], template_labels[:, 1:])
    return mean_probability(forget_logits[:, :-1], forget_labels[:, 1:]).tanh() / 2 - template.tanh() / 2


def mean_probability(logits: Tensor, labels: Tensor) -> Tensor:  # [B, T, V], [B, T] -> []
    means = []
    for row, label in zip(logits, labels, strict=True):
        labelled = label != -100
        p = row.softmax(-1).gather(-1, label.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        means.append((p * labelled).mean())
    return torch.stack(means).mean()


class _ChunkByChunk(torch.autograd.Function):
    """Gradients in the forward, chunk by chunk, by autograd: what one writes in plain torch to spare the logits."""

    @staticmethod
    def forward(ctx: Any, loss_of: Callable[..., Tensor], chunks: int, weight: Tensor, *hidden: Tensor) -> Tensor:
        d_weight, d_hidden, total = (
            torch.zeros_like(weight),
            [torch.empty_like(x) for x in hidden],
            weight.new_zeros(()),
        )
        pieces = zip(*(torch.arange(len(x), device=x.device).chunk(chunks) for x in hidden), strict=True)
        with torch.enable_grad():
            w = weight.detach().requires_grad_()
            for rows in pieces:
                own = [x.detach()[i].requires_grad_() for x, i in zip(hidden, rows, strict=True)]
                loss = loss_of(rows[0], w, *own)
                gradient, *others = torch.autograd.grad(loss, [w, *own])
                d_weight += gradient
                for whole, i, part in zip(d_hidden, rows, others, strict=True):
                    whole[i] = part
                total += loss.detach()
        ctx.save_for_backward(d_weight, *d_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(x * grad for x in ctx.saved_tensors)


def chunked_linear_flat_loss(
    template_hidden: Tensor,  # [B, T, H]
    template_labels: Tensor,  # [B, T]
    forget_hidden: Tensor,  # [B, T', H]
    forget_labels: Tensor,  # [B, T']
    weight: Tensor,  # [V, H]
) -> Tensor:  # []
    """The paper's total variation, a sequence of each side at a time."""
    B = len(template_hidden)

    def loss_of(rows: Tensor, w: Tensor, template: Tensor, forget: Tensor) -> Tensor:
        e = _answer_probability(template, template_labels[rows], w)
        f = _answer_probability(forget, forget_labels[rows], w)
        return (f.tanh() / 2 - e.tanh() / 2).sum() / B

    return _ChunkByChunk.apply(loss_of, B, weight, template_hidden, forget_hidden)


def _answer_probability(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:  # [b, T, H], [b, T] -> [b]
    return eager_linear_token_logprobs(hidden[:, :-1], weight, labels[:, 1:]).exp().mean(1)


def chunked_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # [N, H], [V, H], [N] -> []
    """In eight chunks."""

    def loss_of(rows: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return -eager_linear_token_logprobs(x, w, labels[rows]).sum() / len(labels)

    return _ChunkByChunk.apply(loss_of, 8, weight, hidden)


def torchs_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """With its chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(hidden, weight, labels, options=options)


# -- libraries for GPUs ------------------------------------------------------------------------------------------------


def liger_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy as function

    return function(logits.clone(), labels, label_smoothing=label_smoothing)  # it overwrites the logits


def liger_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

    return function(hidden, weight, labels)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as function

    return function(hidden, weight, labels)
