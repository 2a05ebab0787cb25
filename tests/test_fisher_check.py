"""Gradients go to the right examples, also where the model's wiring depends on the data, and the check proves it."""

import warnings

import pytest
import torch
from fisher_layers import DoubledProduct, Wiring, parameter
from test_fisher import fisher, one_example_at_a_time, relative_error
from torch import nn
from torch.nn import functional as F

from unlearn_fast import classification_losses
from unlearn_fast.fisher.per_example import PerExample


@pytest.fixture
def checks(monkeypatch):
    """How many batches were checked."""
    made = []
    check = PerExample._check

    def counted(self, *arguments):
        made.append(1)
        return check(self, *arguments)

    monkeypatch.setattr(PerExample, "_check", counted)
    return made


def assert_exact(model, batches, tolerance=1e-5):
    """Returns the warnings."""
    model.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = fisher(model, batches)
    exact = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    truth = one_example_at_a_time(model.double(), exact, classification_losses)
    for name, expected in truth.items():
        assert relative_error(ours[name], expected) < tolerance or (not expected.any() and not ours[name].any()), name
    return [str(w.message) for w in caught if "one example at a time" in str(w.message)]


def labelled(x):
    return x, torch.arange(len(x)) % 4


def batches_of(*sizes, width=9):
    torch.manual_seed(0)
    return [labelled(torch.randn(n, width)) for n in sizes]


def test_one_check_serves_batches_alike(checks):
    assert not assert_exact(nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)), batches_of(5, 5, 3, 1, 7))
    assert len(checks) == 1


def test_single_examples_need_no_check(checks):
    assert not assert_exact(nn.Linear(9, 4), batches_of(1, 1, 1))
    assert not checks


def test_another_branch_is_checked_anew(checks):
    """The second branch is first taken by the third batch, and uses a weight in another layout."""

    def forward(m, x):
        if x[0, 0] > 0:
            return m.head(torch.tanh(m.a(x)))
        return m.head(torch.tanh(m.b(x.T.contiguous().view(9, -1).T) + F.linear(x, m.a.weight)))

    batches = batches_of(4, 4, 4, 4)
    for (x, _), sign in zip(batches, (1, 1, -1, -1), strict=True):
        x[0, 0] = sign
        x[1:, 0] = sign  # for the single examples too
    model = Wiring(forward, a=nn.Linear(9, 6), b=nn.Linear(9, 6), head=nn.Linear(6, 4))
    assert not assert_exact(model, batches)
    assert len(checks) == 2


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


def test_a_loop_of_another_length(checks):
    def forward(m, x):
        state = m.start.expand(len(x), -1)
        for column in x.unbind(1):
            state = torch.tanh(m.step(state) + column[:, None] * m.gain)
        return m.head(state)

    model = Wiring(forward, start=parameter(6), step=nn.Linear(6, 6), gain=parameter(6), head=nn.Linear(6, 4))
    assert not assert_exact(model, batches_of(4) + batches_of(3, width=5) + batches_of(5, width=12))
    assert len(checks) == 1


def test_examples_that_see_one_another():
    """Their gradients are, by definition, those of one example at a time."""

    def forward(m, x):
        return m.head(m.inner(x) - m.inner(x).mean(0, keepdim=True) * 0.5)

    model = Wiring(forward, inner=nn.Linear(9, 6), head=nn.Linear(6, 4))
    messages = assert_exact(model, batches_of(4, 4))
    assert all(any(name in message for message in messages) for name in ("inner", "head"))


def test_examples_in_another_order_inside():
    """Rows are sorted before a layer and put back: the layer's rows are not in the order of the losses."""

    def forward(m, x):
        order = x[:, 0].argsort()
        return m.head(torch.tanh(m.inner(x[order]))[order.argsort()])

    model = Wiring(forward, inner=nn.Linear(9, 6), head=nn.Linear(6, 4))
    batches = batches_of(6, 6)
    assert any("inner" in message for message in assert_exact(model, batches))


def test_sizes_that_could_be_taken_for_the_batch():
    """Every axis has the size of the batch."""

    def forward(m, x):
        x = torch.tanh(m.embed(x) * m.gain + m.table)
        return m.head(torch.tanh(x @ m.mix + (1 + m.gain)).mean(1))

    torch.manual_seed(0)
    model = Wiring(
        forward, embed=nn.Embedding(5, 5), gain=parameter(5), table=parameter(5, 5), mix=parameter(5, 5),
        head=nn.Linear(5, 5),
    )  # fmt: skip
    assert not assert_exact(model, [labelled(torch.randint(0, 5, (5, 5))) for _ in range(3)])


def test_a_repeated_first_example_tells_the_order_of_flattened_rows():
    """[T, B] flattened to rows: the example changes fastest."""

    def forward(m, x):
        rows = x.view(len(x), 3, 3).transpose(0, 1).reshape(-1, 3)
        return m.head(torch.tanh(m.inner(rows)).view(3, len(x), 6).sum(0))

    assert not assert_exact(Wiring(forward, inner=nn.Linear(3, 6), head=nn.Linear(6, 4)), batches_of(4, 5))


def test_a_loss_that_is_not_finite_stays_its_own():
    """Also where it is that of the first example, which the check repeats."""
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    (x, y) = batches_of(4)[0]
    x[0, 0] = float("nan")
    ours = fisher(model, [(x, y)])
    assert ours["0.weight"].isnan().all() and ours["2.bias"].isnan().all()


def test_a_faint_use_that_nothing_shows_counts():
    """Its gradient is below what rounding leaves of the others'."""
    model = Wiring(
        lambda m, x: m.head(x) + 1e-7 * DoubledProduct.apply(x, m.faint, m.gain), head=nn.Linear(9, 4),
        faint=parameter(4, 9), gain=nn.Parameter(torch.ones(4), requires_grad=False),
    )  # fmt: skip
    assert any("the model itself" in message for message in assert_exact(model, batches_of(4)))


def test_a_gradient_penalty_that_begins_later():
    """Its second derivatives reach the parameters by ways that no tap sees."""
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4))

    def losses(m, batch):
        x = batch[0].detach().requires_grad_()
        values = classification_losses(m, (x, batch[1]))
        if x[0, 0] > 0:
            return values
        (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        return values + gradient.square().sum(1)

    batches = batches_of(4, 4)
    for (x, _), sign in zip(batches, (1, -1), strict=True):
        x[:, 0] = sign
    with pytest.warns(UserWarning, match="one example at a time"):
        ours = fisher(model, batches, losses)
    truth = one_example_at_a_time(model.double(), [(x.double(), y) for x, y in batches], losses)
    for name, expected in truth.items():
        assert relative_error(ours[name], expected) < 1e-5, name


def test_another_rank_and_another_number_of_entries(checks):
    """[B, H], then [B, T, H] with T a multiple of B, then [2 B, H] with the example changing fastest."""

    def forward(m, x):
        if x.shape[1] == 9:
            return m.head(torch.tanh(m.inner(x[:, :3])))
        if x.shape[1] == 24:
            return m.head(torch.tanh(m.inner(x.view(len(x), 8, 3))).sum(1))
        rows = x.view(len(x), -1, 3).transpose(0, 1).reshape(-1, 3)
        return m.head(torch.tanh(m.inner(rows)).view(-1, len(x), 6).sum(0))

    model = Wiring(forward, inner=nn.Linear(3, 6), head=nn.Linear(6, 4))
    batches = batches_of(4) + batches_of(4, width=24) + batches_of(4, width=6) + batches_of(4, 4, width=12)
    assert not assert_exact(model, batches)


def test_influence_by_a_maximum():
    """One example more, a copy of the first, changes no maximum; each example alone does."""

    def forward(m, x):
        hidden = m.inner(x)
        return m.head(hidden / hidden.detach().abs().amax())

    model = Wiring(forward, inner=nn.Linear(9, 6), head=nn.Linear(6, 4))
    assert any("depend on the other examples" in message for message in assert_exact(model, batches_of(5, 4)))


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
