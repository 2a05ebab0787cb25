"""Gradients go to the right examples, also where the model's wiring depends on the data, and the check proves it."""

import functools
import warnings

import pytest
import torch
from fisher_layers import DoubledProduct, Wiring, parameter
from test_fisher import fisher, one_example_at_a_time, relative_error
from torch import nn
from torch.nn import functional as F

from unlearn_fast import classification_losses


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


def time_major(m, x):  # [B, T, 3]
    return m.head(torch.tanh(m.inner(x.transpose(0, 1).reshape(-1, 3))).view(-1, len(x), 6).mean(0))


def batch_major(m, x):
    return m.head(torch.tanh(m.inner(x.reshape(-1, 3))).view(len(x), -1, 6).mean(1))


def sequences(*shapes):
    torch.manual_seed(0)
    return [labelled(torch.randn(*shape, 3)) for shape in shapes]


def test_a_single_position_does_not_hide_the_order_of_rows(checks):
    model = Wiring(time_major, inner=nn.Linear(3, 6), head=nn.Linear(6, 4))
    assert not assert_exact(model, sequences((4, 4), (4, 1), (4, 4)))


def test_rows_that_are_all_alike_at_first():
    """Zeros do not tell their order; another use of the weight does not tell it for them."""
    model = Wiring(lambda m, x: m.head(sum(m.encode(s) for s in (x[:, 0], x[:, 1]))), inner=nn.Linear(3, 6, bias=False))
    model.encode = lambda s: torch.tanh(model.inner(s.transpose(0, 1).reshape(-1, 3))).view(-1, len(s), 6).mean(0)
    model.head = nn.Linear(6, 4)
    batches = sequences(*[(4, 2, 4)] * 3)
    batches[0][0][:, 1] = 0
    assert not assert_exact(model, batches)


def test_a_call_that_is_skipped_later():
    def forward(m, x):
        first = batch_major(m, x) if x[0, 0, 0] > 0 else 0
        return first + time_major(m, x)

    batches = sequences(*[(4, 4)] * 4)
    for i, (x, _) in enumerate(batches):
        x[:, 0, 0] = 1 if i < 2 else -1
    assert_exact(Wiring(forward, inner=nn.Linear(3, 6), head=nn.Linear(6, 4)), batches)


def test_small_batches_that_go_another_way():
    model = Wiring(
        lambda m, x: time_major(m, x) if len(x) > 2 else batch_major(m, x), inner=nn.Linear(3, 6), head=nn.Linear(6, 4)
    )
    assert_exact(model, sequences((6, 4), (6, 4), (2, 4)))


@pytest.mark.parametrize("gamma", [1.0, 1e-6])
def test_rows_in_an_order_that_no_plan_knows(gamma):
    """[T1, B, T2], in front of a layer scale that makes the gradient too faint to disturb the others."""

    def forward(m, x):
        B, T1, T2, C = x.shape
        rows = torch.tanh(m.mix(x.permute(1, 0, 2, 3).reshape(-1, C))).view(T1, B, T2, C).transpose(0, 1)
        return m.head((x + gamma * rows).flatten(1))

    torch.manual_seed(0)
    batches = [labelled(torch.randn(4, 2, 3, 5)) for _ in range(2)]
    model = Wiring(forward, mix=nn.Linear(5, 5), head=nn.Linear(30, 4)).double()
    truth = one_example_at_a_time(model, [(x.double(), y) for x, y in batches], classification_losses)
    with pytest.warns(UserWarning, match=r"mix \(Linear\): its gradients could not be told apart"):
        ours = fisher(model.float(), batches)
    assert all(relative_error(ours[name], expected) < 1e-5 for name, expected in truth.items())


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_statistics_of_the_batch_that_take_no_gradient(scale):
    """Also where the losses, squared errors, are small."""

    def losses(m, batch):
        hidden = m.inner(batch[0])
        return (scale * m.head(hidden / hidden.detach().abs().amax()) - scale * batch[0][:, :4]).square().mean(1)

    model = Wiring(None, inner=nn.Linear(9, 6), head=nn.Linear(6, 4))
    with pytest.warns(UserWarning, match="depend on the other examples"):
        fisher(model, batches_of(6, 6), losses)


def test_what_nothing_shows_is_found_late(monkeypatch):
    """Examples in another order, made by plain slices: neither a function nor a shape differs."""
    monkeypatch.setattr("unlearn_fast.fisher.per_example.AGAIN", 4)

    def forward(m, x):
        cut = int(m.turned)
        turned = torch.cat([x[cut:], x[:cut]])
        hidden = torch.tanh(m.inner(turned))
        return m.head(torch.cat([hidden[len(x) - cut :], hidden[: len(x) - cut]]))

    model = Wiring(forward, inner=nn.Linear(9, 6), head=nn.Linear(6, 4))
    model.turned = 0
    losses = functools.partial(classification_losses, labels="all")

    def batches():
        for i, batch in enumerate(batches_of(*[5] * 6)):
            model.turned = 2 if i > 1 else 0
            yield batch

    with pytest.raises(RuntimeError, match=r"inner\.weight.*no longer reach the right examples in batch 4"):
        fisher(model, batches(), losses)
