"""The README's examples run as they stand, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import unlearn_fast

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # with so few examples nothing may be selected


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def digits_classifier() -> dict[str, object]:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    importance = unlearn_fast.diagonal_fisher(model, batches[:1], unlearn_fast.classification_losses, progress=False)
    return {
        "model": model,
        "forget_loader": batches[:1],
        "train_loader": batches,
        "forget_importance": importance,
    }


def language_model() -> dict[str, object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = torch.randint(0, 40, (2, 2, 9))
    models = [LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)) for _ in range(2)]
    return {
        "torch": torch,
        "model": models[0],
        "reference_model": models[1],
        "ids": ids[1],
        "labels": ids[1],
        "template_ids": ids[0],
        "template_labels": ids[0],
        "forget_ids": ids[1],
        "forget_labels": ids[1],
    }


@pytest.mark.parametrize("number", range(len(examples())))
def test_example(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = examples()[number]
    namespace = language_model() if "loss.backward" in code else digits_classifier()
    before = [p.detach().clone() for p in namespace["model"].parameters()]
    exec(compile(code, f"README example {number + 1}", "exec"), namespace)
    if "loss.backward" in code:
        assert all(p.grad is not None for p in namespace["model"].parameters())
    elif "alpha=5.0" in code:
        # f / r is 3 where the other examples' gradients vanish, at most: nothing is selected at 5.
        assert all(torch.equal(a, b) for a, b in zip(before, namespace["model"].parameters(), strict=True))
        assert (tmp_path / "reference.safetensors").exists()


def test_the_rule_of_the_docs():
    """It serves its module, and is right."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    exec(compile(code, "docs/methods.md", "exec"), namespace)
    torch.manual_seed(0)
    model, x = nn.Sequential(namespace["DoubledLinear"](5, 3)), torch.randn(4, 5)
    losses = lambda m, b: m(b).square().sum(1)  # noqa: E731
    assert unlearn_fast.coverage(model, x, losses) == {"0.weight": "DoubledLinear"}
    ours = unlearn_fast.diagonal_fisher(model, [x], losses, progress=False)["0.weight"]
    squares = [torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0].square() for loss in losses(model, x)]
    torch.testing.assert_close(ours, torch.stack(squares).mean(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


def test_the_examples_of_dampening(tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would type them; the model is as before at the end of the last."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.ModuleDict({"lm_head": nn.Linear(4, 4), "model": nn.ModuleDict({"layers": nn.ModuleList()})})
    model["model"]["layers"].extend(Layer() for _ in range(25))
    f, r = ({name: k * torch.rand_like(p) for name, p in model.named_parameters()} for k in (9, 1))
    norms = {"forget": model["lm_head"].weight, "retain": model["model"]["layers"][0].mlp.weight}
    scope = {"model": model, "f": f, "r": r, "evaluate": lambda _: {k: p.norm().item() for k, p in norms.items()}}
    *first, last = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "dampening.md").read_text(), re.DOTALL)
    for code in first:
        exec(code, scope)
    assert len(scope["curve"].alphas) == 6
    before = [p.clone() for p in model.parameters()]
    exec(last, scope)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert len(scope["table"].rows) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"curve.png", "pareto.png"}


def test_links():
    for page in (README, ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_figures_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pages

    assert pages.differences() == []


def test_every_public_name_has_a_docstring_and_is_exported():
    for name in unlearn_fast.__all__:
        assert getattr(unlearn_fast, name).__doc__, name
