"""The end-to-end benchmarks: the model is Llama's, what is right passes, and what is wrong is not timed."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

import unlearn_fast
from unlearn_fast.benchmarking import end_to_end, fisher, measure, memory, rivals
from unlearn_fast.benchmarking.case import Inputs, Results, make_inputs
from unlearn_fast.benchmarking.end_to_end import SIDES, EndToEnd
from unlearn_fast.benchmarking.gpt import next_token_losses
from unlearn_fast.benchmarking.llama import Llama

SSD, *STEPS = [case for case in end_to_end.smallest() if isinstance(case, EndToEnd)]


def small_llama() -> Llama:
    torch.manual_seed(0)
    model = Llama(60, 32, 2, 4, 2, 48).double()
    with torch.no_grad():
        for p in model.parameters():  # norms' weights, which begin at 1, too
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_llama_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, rms_norm_eps=1e-5, rope_theta=500_000.0, tie_word_embeddings=True,
    )  # fmt: skip
    theirs, ours = transformers.LlamaForCausalLM(config).double(), small_llama()
    prefixed = {name if name.startswith("lm_head") else f"model.{name}": p for name, p in ours.state_dict().items()}
    theirs.load_state_dict(prefixed)
    ids = torch.randint(60, (3, 11))
    logits = ours(ids)
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-5)  # they normalise in float32
    assert logits.std() > 0.5
    losses = theirs(ids, labels=ids).loss, next_token_losses(ours, ids).mean()
    names = [name for name, _ in ours.named_parameters()]
    assert [f"model.{name}" for name in names] == [name for name, _ in theirs.named_parameters()]
    gradients = (
        torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (theirs, ours), strict=True)
    )
    for name, expected, found in zip(names, *gradients, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_rules_serve_every_parameter_of_llama() -> None:
    found = unlearn_fast.coverage(small_llama().float(), torch.randint(60, (3, 11)), next_token_losses)
    assert set(found.values()) == {"embedding + linear", "linear", "broadcast"}
    assert found["embed_tokens.weight"] == "embedding + linear"


def test_the_largest_model_has_the_size_of_llama_3_2_1b() -> None:
    assert sum(p.numel() for p in fisher.on_meta(fisher.LLAMA_1B(T=512)).parameters()) == 1_235_814_400


@pytest.mark.parametrize("case", [SSD, *STEPS], ids=lambda case: case.name)
def test_every_implementation_is_right(case: EndToEnd) -> None:
    inputs = make_inputs(case)
    for entrant in case.entrants():
        if "compile" not in entrant.name:  # `bench` compiles it
            results = entrant.run(case.fresh(inputs))
            verdict = case.verdict(entrant, results, entrant.exact(case.fresh(inputs)))
            assert not verdict.failure and verdict.error < 0.03, f"{entrant.name}: {verdict}"


def judged(case: EndToEnd, run: Callable[[Inputs], Results]) -> str:
    """Why such an implementation would not be timed."""
    inputs = make_inputs(case)
    rival = next(e for e in case.entrants() if e.kind == "rival")
    return case.verdict(rival, run(case.fresh(inputs)), rival.exact(case.fresh(inputs))).failure


def ssd(x: Inputs, **changed: object) -> Results:
    given = {"forget": x["forget"], "reference": x["reference"], "alpha": end_to_end.ALPHA, "lam": end_to_end.LAM}
    unlearn_fast.ssd_(x["model"], losses=SSD.model.losses, progress=False, **(given | changed))
    return (end_to_end._joined(x["model"]),)


def test_another_quantity_is_no_ssd() -> None:
    assert judged(SSD, ssd) == ""
    assert judged(SSD, partial(ssd, mode="batch")).startswith("wrong by")
    assert judged(SSD, partial(ssd, lam=0.5)).startswith("wrong by")
    assert judged(SSD, lambda x: ssd(x, reference=x["reference"][:1])).startswith("wrong by")
    assert judged(SSD, lambda x: (end_to_end._joined(x["model"]),)).startswith("wrong by 1.0e+00, allowed is 1.0e-01")
    assert judged(SSD, lambda x: (ssd(x)[0][1:],)).startswith("wrong by inf")


def test_ssd_has_to_be_right_in_float64_too() -> None:
    def nothing_in_float64(x: Inputs) -> Results:
        return (end_to_end._joined(x["model"]),) if next(x["model"].parameters()).dtype == torch.float64 else ssd(x)

    case = replace(SSD, ours=nothing_in_float64)
    inputs = make_inputs(case)
    ours = case.entrants()[0]
    verdict = case.verdict(ours, ours.run(case.fresh(inputs)), ours.exact(case.fresh(inputs)))
    assert verdict.failure == "wrong by 1.0e+00 in float64"


def test_plain_torch_that_fails_excuses_nothing() -> None:
    inputs = make_inputs(SSD)
    rival = next(e for e in SSD.entrants() if e.kind == "rival")
    *exact, _ = rival.exact(SSD.fresh(inputs))
    nothing = (end_to_end._joined(inputs["model"]),)
    for plain in (float("inf"), float("nan")):
        assert SSD.verdict(rival, nothing, (*exact, torch.tensor(plain))).failure.startswith("wrong by 1.0e+00")


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_a_wrong_gradient_is_no_training_step(case: EndToEnd) -> None:
    def released(x: Inputs, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Results:
        def loss(model: Llama, x: Inputs) -> torch.Tensor:
            sides = (change(model(x[side]), x[side]) for side in SIDES)
            return rivals.released_flat_loss(
                *(given for z, side in zip(sides, SIDES, strict=True) for given in (z, x[side]))
            )

        return end_to_end._step(loss)(x)

    def with_gradients(x: Inputs, change: Callable[[list[torch.Tensor]], None]) -> Results:
        loss, *gradients = case.ours(x)
        change(gradients)
        return loss, *gradients

    right = partial(released, change=lambda logits, ids: logits)
    assert judged(case, right) == ""
    swapped = dict(zip(SIDES, reversed(SIDES), strict=True))
    wrong: dict[str, Callable[[Inputs], Results]] = {
        "the sides swapped": lambda x: right({**x, **{side: x[other] for side, other in swapped.items()}}),
        "one answer is missing": lambda x: right({**x, "template": x["template"][:1]}),
        "another temperature": partial(released, change=lambda logits, ids: logits / 2),
        "a layer stands still": lambda x: with_gradients(x, lambda g: g[3].zero_()),
        "an eighth too large": lambda x: with_gradients(x, lambda g: g[-1].mul_(1.125)),
        "not a number": lambda x: with_gradients(x, lambda g: g[0][:1].fill_(float("nan"))),
        "the loss alone": lambda x: (case.ours(x)[0] * 2, *case.ours(x)[1:]),
        "no gradients": lambda x: case.ours(x)[:1],
    }
    for name, run in wrong.items():
        assert judged(case, run).startswith("wrong by"), name


def test_a_step_moves_the_optimizer_and_no_weight() -> None:
    x = make_inputs(STEPS[0])
    before = [p.detach().clone() for p in x["model"].parameters()]
    for _ in range(2):
        STEPS[0].ours(x)
    state = x["optimizer"].state
    for p, old in zip(x["model"].parameters(), before, strict=True):
        assert torch.equal(p, old) and p.grad is None
        assert state[p]["step"] == 3 and state[p]["exp_avg"].any()  # the first step made its tensors


@pytest.mark.parametrize("case", [SSD, STEPS[0], fisher.smallest()[-1]], ids=lambda case: case.name)
def test_nothing_of_a_case_stays_in_memory(case: EndToEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next case's model may need it."""
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: None)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    case = replace(case, rivals={name: run for name, run in case.rivals.items() if "compile" not in name})

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(held, torch.Tensor) and held.device.type != "meta" for held in gc.get_objects())

    measure.measure(case, cold=False)  # what is made once: the model on "meta", a rival's compiled functions
    before = tensors()
    outcome = measure.measure(case, cold=False)
    assert not outcome.failed and tensors() == before
