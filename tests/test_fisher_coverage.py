"""`coverage` tells beforehand which rule serves each parameter; rules of one's own serve theirs."""

import fisher_layers
import pytest
import torch
from fisher_models import CASES, Transformer, vectors
from test_fisher import fisher, one_example_at_a_time, relative_error
from test_fisher_options import mlp
from torch import nn

from unlearn_fast import classification_losses, coverage


@pytest.mark.parametrize("name", CASES)
def test_coverage_tells_beforehand_what_will_serve(name):
    torch.manual_seed(0)
    model, batch, slow = CASES[name]()
    expected = coverage(model)
    found = coverage(model, batch, classification_losses)
    assert list(expected) == list(found) == [n for n, _ in model.named_parameters()]
    if name != "tokens_chosen_by_a_mask":  # its first two examples happen to choose as many tokens each
        assert {n for n, rule in found.items() if rule.startswith("one example at a time: ")} == set(slow)
    for parameter, rule in expected.items():
        if rule not in ("found on the first batch", found[parameter]):
            assert parameter in slow or rule in found[parameter].split(" + "), (parameter, rule, found[parameter])


def test_coverage_of_frozen_and_unused_parameters_and_its_errors():
    model = mlp()
    model[0].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    assert coverage(model) == {
        "unused": "found on the first batch", "0.weight": "linear", "0.bias": "frozen", "2.weight": "linear",
        "2.bias": "linear",
    }  # fmt: skip
    found = coverage(model, vectors(), classification_losses)
    assert found["unused"] == "unused" and found["0.bias"] == "frozen"
    with pytest.raises(ValueError, match="losses is missing"):
        coverage(model, vectors())
    with pytest.raises(ValueError, match="batch holds a single example"):
        coverage(model, vectors(1), classification_losses)


# -- rules of one's own ------------------------------------------------------------------------------------------------


def test_the_registered_rule_serves_its_module():
    model, batch, _ = CASES["kernels_that_torch_does_not_show"]()
    assert coverage(model)["ruled.weight"] == "DoubledWithRule"
    assert coverage(model, batch, classification_losses)["ruled.gain"] == "DoubledWithRule"


def test_a_wrong_rule_is_found_by_the_check():
    class Wrong(fisher_layers.Doubled):
        def forward(self, x, scale=1.0):
            return super().forward(x, scale=scale)[0]

    @fisher_layers.rule_for(Wrong)
    def wrong(module, x, scale=1.0):  # forgets the factor 2
        return {
            "weight": fisher_layers.Use((x,), lambda g, x: fisher_layers.Outer(x[:, None], (g * module.gain)[:, None]))
        }

    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(Wrong(9, 4)).eval(), vectors()
    with pytest.warns(UserWarning, match=r"0 \(Wrong\)"):
        ours = fisher(model, [(x, y)])
    truth = one_example_at_a_time(model, [(x, y)], classification_losses)
    for name in truth:
        assert relative_error(ours[name], truth[name]) < 1e-5


def test_transformer_is_covered():
    found = coverage(
        Transformer(tied=True), (torch.randint(0, 11, (3, 7)), torch.zeros(3).long()), classification_losses
    )
    assert found["tokens.weight"] == "embedding + linear" and found["positions.weight"] == "broadcast + embedding"
