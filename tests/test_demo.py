"""The demo at its quick size, and its measurements against numbers worked out by hand."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from unlearn_fast import demo
from unlearn_fast.demo import evaluation, table
from unlearn_fast.demo.authors import TEMPLATES, Words, make_world
from unlearn_fast.demo.resnet import ResNet18


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("demo") / "made" / "by main"
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    # Models this small gain nothing from a second thread, and lose minutes where threads wait for a busy core.
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # nothing selected, or an importance of other weights
            results = demo.main(out, quick=True, show_progress=False)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was changed"
    return results, out


def test_files(quick: tuple[dict[str, Any], Path]) -> None:
    results, out = quick
    assert json.loads((out / "demo.json").read_text()) == results
    for picture in ("demo_ssd.png", "demo_flat.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {"demo.json", "demo_ssd.png", "demo_flat.png"}


def test_ssd_forgets_the_digit_and_little_else(quick: tuple[dict[str, Any], Path]) -> None:
    part = quick[0]["ssd"]
    models = part["models"]
    assert set(models) == {"before", "ssd", "released", "released_tuned", "retrained"}
    assert all(0 <= share <= 1 for model in models.values() for share in model.values())
    before, after = models["before"], models["ssd"]
    assert before["retained"] > 0.8 and before["forgotten"] > 0.8
    assert models["retrained"]["forgotten"] == 0  # it never saw the digit
    forgotten = before["forgotten"] - after["forgotten"]
    assert forgotten > 0.3 and forgotten > 3 * (before["retained"] - after["retained"])


def test_ssd_dampens_some_values_of_every_kind_of_layer(quick: tuple[dict[str, Any], Path]) -> None:
    dampened = quick[0]["ssd"]["dampened"]
    assert len(dampened["layers"]) == 41  # 20 convolutions, the same number of BatchNorms, and the head
    assert all(0 <= share <= 1 for share in dampened["layers"].values())
    assert dampened["layers"]["head"] > 0
    assert 0 < dampened["share"]["ssd"] < 0.5


def test_flat_forgets_the_authors(quick: tuple[dict[str, Any], Path]) -> None:
    part = quick[0]["flat"]
    before, after = part["before"], part["after"]
    for mean in ("mean", "geometric"):
        assert before["forget"][mean] > 0.5 and before["retain"][mean] > 0.5
        forgotten = after["forget"][mean] / before["forget"][mean]
        assert forgotten < 0.5 and forgotten < after["retain"][mean] / before["retain"][mean]
    assert after["template"]["geometric"] > before["template"]["geometric"]
    assert part["samples"]["forget"]["truth"] == part["samples"]["forget"]["before"]


def test_seconds_are_measured(quick: tuple[dict[str, Any], Path]) -> None:
    results = quick[0]
    seconds = [*results["ssd"]["seconds"].values(), *results["flat"]["seconds"].values()]
    assert all(value > 0 for value in seconds)
    assert sum(seconds) < results["seconds"]


def test_table_says_what_was_measured(quick: tuple[dict[str, Any], Path]) -> None:
    results = quick[0]
    lines = table.text(results).splitlines()
    targets = [target for part in ("ssd", "flat") for target in results[part]["targets"]]
    assert len(targets) == 4
    for target in targets:
        (line,) = [line for line in lines if target["name"] in line]
        assert line.split()[-2:] == [f"{target['measured']:.1%}", "yes" if target["met"] else "NO"]
    (line,) = [line for line in lines if "exact importances" in line]
    assert f"{results['ssd']['models']['ssd']['retained']:.1%}" in line
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("measured", "limit", "at_most", "met"),
    [(0.1, 0.1, True, True), (0.11, 0.1, True, False), (0.8, 0.8, False, True), (0.79, 0.8, False, False)],
)
def test_target(measured: float, limit: float, at_most: bool, met: bool) -> None:
    assert evaluation.target("name", measured, limit, at_most=at_most)["met"] is met


def test_target_is_not_met_by_nan() -> None:
    assert evaluation.target("name", math.nan, 0.1, at_most=True)["met"] is False
    assert evaluation.target("name", math.nan, 0.8, at_most=False)["met"] is False


def test_accuracy() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    assert evaluation.accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75


def test_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -1e4, -1e4]])
    expected = [math.log(4), 0.0, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)]
    torch.testing.assert_close(
        evaluation.entropy(logits), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_membership_inference_tells_sure_from_unsure() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    suspects = torch.cat([sure.repeat(3, 1), unsure])
    # Balanced: ten times as many members do not make everybody a member.
    assert evaluation.membership_inference(sure.repeat(200, 1), unsure.repeat(20, 1), suspects) == 0.75
    assert evaluation.membership_inference(sure.repeat(20, 1), unsure.repeat(200, 1), suspects) == 0.75
    # An attacker goes by what it was fitted on: here it is the members that are unsure.
    assert evaluation.membership_inference(unsure.repeat(20, 1), sure.repeat(20, 1), suspects) == 0.25


def test_answer_probabilities() -> None:
    p = torch.tensor([[[0.5, 0.5], [0.8, 0.2], [0.3, 0.7]], [[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]])
    labels = torch.tensor([[-100, 0, 1], [-100, -100, 1]])  # the label at t is predicted at t - 1
    mean, geometric = evaluation.answer_probabilities(p.log(), labels)
    torch.testing.assert_close(mean, torch.tensor([0.35, 0.1], dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(geometric, torch.tensor([math.sqrt(0.1), 0.1], dtype=torch.float64), atol=1e-7, rtol=0)


def test_world_is_made_from_the_seed_and_shares_no_answer() -> None:
    world = make_world(5, authors=6, forget=2, strangers=3)
    assert world == make_world(5, authors=6, forget=2, strangers=3)
    assert world != make_world(6, authors=6, forget=2, strangers=3)
    assert [len(part) for part in (world.forget, world.retain, world.strangers)] == [24, 48, 36]
    names = [{pair.author for pair in part} for part in (world.forget, world.retain, world.strangers)]
    assert [len(part) for part in names] == [2, 4, 3] and len(set.union(*names)) == 9
    assert {pair.answer for pair in world.strangers} == set(TEMPLATES)
    assert not {pair.answer for pair in world.forget} & {pair.answer for pair in world.retain}


def test_world_refuses_too_many_authors() -> None:
    with pytest.raises(ValueError, match="forget=3, authors=3"):
        make_world(0, authors=3, forget=3)


def test_words() -> None:
    words = Words()
    world = make_world(0)
    for pair in world.train:
        assert words.decode(words.encode(f"{pair.question} {pair.answer}")) == f"{pair.question} {pair.answer}"
    ids, labels = words.batch(["what is", "what"], ["karvel", "i do not know ."])
    assert ids.shape == labels.shape == (2, 8)
    assert ids[0].tolist()[:1] == [Words.BEGIN] and ids[0].tolist()[4:] == [Words.END] + [Words.PAD] * 3
    assert labels[0].tolist() == [-100] * 3 + [words.encode("karvel")[0], Words.END] + [-100] * 3
    assert labels[1].tolist() == [-100] * 2 + [*words.encode("i do not know ."), Words.END]


def test_resnet_has_eighteen_layers_and_keeps_small_images() -> None:
    model = ResNet18(width=4).eval()
    kernels = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(kernels) + 1 == 18
    assert model.stem.stride == (1, 1)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
