"""The end-to-end benchmark cases: the model is Llama, and a wrong quantity is not timed."""

import copy
import dataclasses

import pytest
import torch

import unlearn_fast
from unlearn_fast.benchmarking import end_to_end, fisher_rivals
from unlearn_fast.benchmarking.case import Entrant, make_inputs
from unlearn_fast.benchmarking.llama import Llama


def of(operator: str):
    return [case for case in end_to_end.smallest() if case.operator == operator]


def test_the_model_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    ours = Llama(50, 32, 2, 4, 2, 48).double()
    state = {name.removeprefix("model."): value for name, value in theirs.state_dict().items()}
    state = {(name if name in ours.state_dict() else f"model.{name}"): value for name, value in state.items()}
    ours.load_state_dict(state)
    ids = torch.randint(50, (3, 11))
    found, wanted = ours(ids), theirs(ids).logits
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()  # their RMSNorm is in float32


def test_its_parameters_all_have_an_exact_rule():
    case = of("flat_training_step")[0]
    model, ids = make_inputs(case)["model"], torch.randint(50, (2, 8))
    served = unlearn_fast.coverage(model, ids, case.model.losses)
    assert set(served) == {name for name, _ in model.named_parameters()}
    assert set(served.values()) == {"embedding + linear", "linear", "broadcast"}  # broadcast: RMSNorm's scales


@pytest.mark.parametrize("case", end_to_end.smallest(), ids=lambda case: case.name)
def test_ours_is_right(case):
    inputs = make_inputs(case)
    (ours, *_) = case.entrants()
    verdict = case.verdict(ours, ours.run(case.fresh(inputs)), ours.exact(case.fresh(inputs)))
    assert not verdict.failure, verdict


def test_another_importance_or_no_dampening_fails():
    (case,) = of("ssd_")
    inputs, exact = make_inputs(case), case.exact(case.fresh(make_inputs(case)))
    released = end_to_end._plain_ssd(case.model, fisher_rivals.released_fisher)
    for run in (released, lambda x: (end_to_end._joined(x["model"]),)):
        entrant = Entrant("wrong", "rival", run, case.exact)
        assert "wrong by" in case.verdict(entrant, run(case.fresh(inputs)), exact).failure


@pytest.mark.parametrize("case", of("flat_training_step"), ids=lambda case: case.name)
@pytest.mark.parametrize("wrong", ["sides swapped", "one gradient 10 % off", "NaN", "one missing"])
def test_a_wrong_gradient_fails(case, wrong):
    inputs = make_inputs(case)
    exact = case.exact(case.fresh(inputs))
    if wrong == "sides swapped":
        inputs["template"], inputs["forget"] = inputs["forget"], inputs["template"]
    results = [copy.deepcopy(r) for r in case.ours(case.fresh(inputs))]
    if wrong == "one gradient 10 % off":
        results[3] *= 1.1
    elif wrong == "NaN":
        results[2].view(-1)[0] = float("nan")
    elif wrong == "one missing":
        results.pop()
    assert "wrong by" in case.verdict(case.entrants()[0], tuple(results), exact).failure


def test_the_step_starts_from_the_same_weights_each_time():
    case = of("flat_training_step")[0]
    inputs = make_inputs(case)
    before = [p.detach().clone() for p in inputs["model"].parameters()]
    first, second = case.ours(case.fresh(inputs)), case.ours(case.fresh(inputs))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs["model"].parameters(), strict=True))
    assert all(p.grad is None for p in inputs["model"].parameters())


def test_a_case_is_described_without_memory_on_a_gpu():
    """Its cost and facts, as its report needs them before anything has run."""
    for case in end_to_end.on_gpu():
        case = dataclasses.replace(case, device="cuda")
        assert case.counted().flops > 1e11 and case.facts()["parameters"] > 1e7
