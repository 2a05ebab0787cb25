"""Where the data decide which row of a function is whose: masks, experts, packed sequences. Every batch is checked."""

import pytest
import torch
from fisher_layers import Wiring
from test_fisher import fisher, relative_error
from test_fisher_check import assert_exact, batches_of, sequences
from torch import nn
from torch.nn import functional as F


def test_rows_chosen_by_a_mask_are_checked_on_every_batch(checks):
    """On the first batches every example chooses as many rows, so that the attribution looks right."""

    def forward(m, x):
        mask = x > 0
        out = torch.zeros(*x.shape, 5, dtype=x.dtype)
        out[mask] = m.chosen(x[mask].unsqueeze(1))
        return m.head(torch.tanh(out).sum(1))

    batches = batches_of(4, 4, 4, 4)
    for x, _ in batches[:2]:
        x.abs_()[:, 5:] *= -1
    messages = assert_exact(Wiring(forward, chosen=nn.Linear(1, 5), head=nn.Linear(5, 4)), batches)
    assert len(messages) == 1 and "chosen (Linear)" in messages[0]
    assert len(checks) == 1 + 4  # of three examples first


def test_experts_chosen_by_a_router(checks):
    """As mixture-of-experts models do it: tokens are gathered by expert, and scattered back."""

    def forward(m, x):
        x = x.view(-1, 3)
        scores = m.router(x).softmax(-1)
        best, choice = scores.max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(m.experts):
            (rows,) = torch.where(choice == index)
            if len(rows):
                out.index_add_(0, rows, torch.tanh(expert(x[rows])) * best[rows, None])
        return m.head(out.view(-1, 9))

    experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    model = Wiring(forward, router=nn.Linear(3, 4), experts=experts, head=nn.Linear(9, 4))
    assert_exact(model, batches_of(6, 6, 5))


@pytest.mark.parametrize("how", ["slices", "repeats"])
def test_examples_packed_by_their_lengths(checks, how):
    """The lengths are equal on the first batch; on the second they are not, and add up to a multiple of the batch."""

    def forward(m, x):
        lengths = x[:, 0].long()
        parts = x[:, 1:].unflatten(1, (4, 2))
        if how == "slices":
            rows = torch.cat([part[:k] for part, k in zip(parts, lengths.tolist(), strict=True)])
        else:
            rows = parts[torch.arange(len(x)).repeat_interleave(lengths), 0]
        hidden = torch.tanh(m.inner(rows))
        example = torch.arange(len(x)).repeat_interleave(lengths)
        return m.head(hidden.new_zeros(len(x), 6).index_add(0, example, hidden))

    batches = batches_of(4, 4, 4)
    for (x, _), lengths in zip(batches, ([4, 4, 4, 4], [4, 3, 2, 3], [1, 4, 2, 1]), strict=True):
        x[:, 0] = torch.tensor(lengths)
    messages = assert_exact(Wiring(forward, inner=nn.Linear(2, 6), head=nn.Linear(6, 4)), batches)
    assert any("inner" in message for message in messages)


@pytest.mark.parametrize("how", ["a list", "numpy"])
def test_lengths_that_come_from_python(how):
    """Torch does not see them, only a tensor of indices that they were made into. All are equal at first."""

    def losses(m, batch):
        x, lengths, y = batch
        if how == "a list":
            index = torch.tensor([5 * b + t for b, length in enumerate(lengths) for t in range(length)])
        else:
            index = torch.from_numpy(
                (torch.arange(5) < torch.tensor(lengths)[:, None]).numpy().reshape(-1).nonzero()[0]
            )
        rows = torch.tanh(m.inner(x.reshape(-1, 2)[index]))
        pooled = rows.new_zeros(len(x), 6).index_add(0, index // 5, rows)
        return F.cross_entropy(m.head(pooled), y, reduction="none")

    torch.manual_seed(0)
    batches = [(torch.randn(4, 10), lengths, torch.arange(4)) for lengths in ([4] * 4, [4] * 4, [4, 2, 5, 5])]
    model = Wiring(None, inner=nn.Linear(2, 6), head=nn.Linear(6, 4))
    with pytest.warns(UserWarning, match="one example at a time"):
        ours = fisher(model, batches, losses)
    expected = {name: torch.zeros_like(p) for name, p in model.double().named_parameters()}
    for x, lengths, y in batches:
        for b, length in enumerate(lengths):
            one = losses(model, (x[b : b + 1].double(), [length], y[b : b + 1]))
            for total, grad in zip(expected.values(), torch.autograd.grad(one.sum(), model.parameters()), strict=True):
                total += grad.square() / 12
    assert all(relative_error(ours[name], truth) < 1e-5 for name, truth in expected.items())


@pytest.mark.parametrize("dispatch", ["where", "argsort"])
def test_experts_that_are_balanced_at_first(dispatch):
    def forward(m, x):
        rows = x.view(-1, 3)
        choice = (rows[:, 0] > 0).long()
        out = torch.zeros_like(rows)
        order = choice.argsort() if dispatch == "argsort" else None
        for index, expert in enumerate(m.experts):
            if order is None:
                (chosen,) = torch.where(choice == index)
            else:
                chosen = order[choice[order] == index]
            out = out.index_add(0, chosen, torch.tanh(expert(rows[chosen])))
        return m.head(out.view(-1, 9))

    batches = batches_of(4, 4)
    x = batches[0][0].view(4, 3, 3)
    x[..., 0] = x[..., 0].abs()
    x[:, 1, 0] *= -1  # one of three tokens of every example
    experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    assert assert_exact(Wiring(forward, experts=experts, head=nn.Linear(9, 4)), batches)


def test_experts_reached_by_products_with_one_hot_matrices():
    def forward(m, x):
        rows = x.reshape(-1, 3)
        onehot = F.one_hot((rows[:, 0] > 0).long(), 2)
        slot = F.one_hot((onehot.cumsum(0) * onehot).sum(1) - 1)
        dispatch = (onehot[:, :, None] * slot[:, None, :]).to(x.dtype)
        given = torch.einsum("sec,sm->ecm", dispatch, rows)
        results = torch.stack([torch.tanh(expert(part)) for expert, part in zip(m.experts, given, strict=True)])
        return m.head(torch.einsum("sec,ecm->sm", dispatch, results).view(len(x), -1))

    batches = sequences(*[(4, 4)] * 3)
    for x, _ in batches[:2]:
        x[..., 0] = torch.tensor([1.0, 1, -1, -1])  # the same number of tokens for both, from every example
    experts = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))
    assert assert_exact(Wiring(forward, experts=experts, head=nn.Linear(12, 4)), batches)
