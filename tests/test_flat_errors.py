"""FLAT: errors name the argument, and the released signs warn."""

import warnings

import pytest
import torch
from test_flat import every_form, make_pair
from torch import Tensor

from unlearn_fast.losses import FLATLoss, flat_forget_loss, flat_loss, flat_template_loss, linear_flat_loss
from unlearn_fast.losses.divergences import REVERSED

pytestmark = pytest.mark.filterwarnings("ignore:formulation='official':UserWarning")


@pytest.mark.parametrize("function", [flat_loss, flat_template_loss, flat_forget_loss, linear_flat_loss, FLATLoss])
def test_unknown_options_name_the_choices(function):
    pair = make_pair()
    args: tuple[Tensor, ...] = {flat_loss: pair, linear_flat_loss: (*pair, torch.randn(9, 37)), FLATLoss: ()}.get(
        function, pair[:2]
    )
    with pytest.raises(ValueError, match=r"divergence must be one of kl, jeffrey, .*neyman; got 'jenson'"):
        function(*args, divergence="jenson")
    with pytest.raises(ValueError, match="formulation must be one of paper, official; got 'released'"):
        function(*args, formulation="released")


BAD_INPUTS = {
    "other B": ({"forget": torch.zeros(2, 7, 37), "forget_labels": torch.zeros(2, 7).long()}, "B = 3 and .* B = 2"),
    "flat logits": ({"template": torch.zeros(27, 37)}, r"template_{kind} has shape \[27, 37\]: it must be \[B, T, .\]"),
    "shifted labels": (
        {"forget_labels": torch.zeros(3, 6).long()},
        r"forget_labels has shape \[3, 6\]",
    ),
    "integer logits": ({"forget": torch.zeros(3, 7, 37).long()}, "forget_{kind} has dtype torch.int64"),
    "float labels": ({"template_labels": torch.zeros(3, 9)}, "template_labels has dtype torch.float32"),
    "bool labels": ({"forget_labels": torch.zeros(3, 7).bool()}, "forget_labels has dtype torch.bool"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_named(case):
    changes, message = BAD_INPUTS[case]
    pair = make_pair(torch.float32)._replace(**changes)
    error = TypeError if "dtype" in message else ValueError
    for formulation in ("paper", "official"):
        with pytest.raises(error, match=message.replace("{kind}", "logits")):
            flat_loss(*pair, formulation=formulation)
        with pytest.raises(error, match=message.replace("{kind}", "logits")):
            FLATLoss(formulation=formulation)(*pair)
        with pytest.raises(error, match=message.replace("{kind}", "hidden")):
            linear_flat_loss(*pair, torch.zeros(5, 37), formulation=formulation)


def test_one_side_alone_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"^logits has shape \[4, 5\]: it must be \[B, T, V\]"):
        flat_template_loss(torch.zeros(4, 5), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"^labels has shape \[2, 3\] and logits \[2, 4, 5\]"):
        flat_forget_loss(torch.zeros(2, 4, 5), torch.zeros(2, 3).long())


@every_form
def test_released_signs_warn_and_the_rest_does_not(divergence, formulation):
    pair, options = make_pair(), {"divergence": divergence, "formulation": formulation}
    calls = [
        lambda: flat_loss(*pair, **options),
        lambda: flat_template_loss(*pair[:2], **options),
        lambda: flat_forget_loss(*pair[2:], **options),
        lambda: linear_flat_loss(*pair, torch.ones(40, 37, dtype=torch.float64), **options),
        lambda: FLATLoss(**options),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        if formulation == "official" and divergence in REVERSED:
            (warning,) = caught
            assert warning.category is UserWarning and warning.filename == __file__
            assert "push the template probability down" in str(warning.message)
        else:
            assert not caught


def test_warns_once_for_each_call_site():
    pair, options = make_pair(), {"divergence": "reverse_kl", "formulation": "official"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            flat_loss(*pair, **options)
        flat_loss(*pair, **options)
        module = FLATLoss(**options)
        for _ in range(2):
            module(*pair)
    assert len(caught) == 3
