"""The studies: their own arithmetic, runs of seconds, and pages that hold the numbers of their records."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import study_importance

    return study_importance


@pytest.fixture
def memory_study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import study_flat_memory

    return study_flat_memory


@pytest.mark.parametrize("name", ["study", "memory_study"])
def test_page_holds_the_numbers_of_the_record(name: str, request: pytest.FixtureRequest) -> None:
    study = request.getfixturevalue(name)
    page, record = ROOT / study.PAGE, ROOT / study.RESULTS
    assert study.fill(page.read_text(), study.regions(json.loads(record.read_text()))) == page.read_text()


def test_ranks_of_equal_values_are_shared(study: ModuleType) -> None:
    ranks = study.mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0, 1.0]))
    assert ranks.tolist() == [5.0, 1.5, 5.0, 3.0, 5.0, 1.5]


def test_correlation_is_that_of_ranks(study: ModuleType) -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert study.correlation(a, a.exp()) == pytest.approx(1)
    assert study.correlation(a, -a) == pytest.approx(-1)
    # Differences of ranks 1, 1, 0, 0: 1 - 6 * 2 / (4 * 15).
    assert study.correlation(a, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(0.8)
    assert study.correlation(a, torch.ones(4)) is None
    assert study.correlation(a[:0], a[:0]) is None


def test_jaccard(study: ModuleType) -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert study.jaccard(a, b) == pytest.approx(1 / 3)
    assert study.jaccard(a, a) == 1
    assert study.jaccard(a & ~a, b & ~b) is None


def test_fill_refuses_a_page_without_the_region(study: ModuleType) -> None:
    assert study.fill("<!-- a -->\nold\n<!-- /a -->", {"a": "new"}) == "<!-- a -->\nnew\n<!-- /a -->"
    with pytest.raises(ValueError, match="0 regions 'b'"):
        study.fill("<!-- a -->\n<!-- /a -->", {"b": ""})


@pytest.mark.slow
def test_quick_run(study: ModuleType, tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # as for the demo: a model this small gains nothing from a second one
    try:
        study.main(["--quick", "--root", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was changed"
    results = json.loads((tmp_path / study.RESULTS).read_text())
    page = (tmp_path / study.PAGE).read_text()
    assert page == study.fill(page, study.regions(results))
    for picture in ("forgetting", "agreement", "layers"):
        assert (tmp_path / study.IMAGES / f"importance_{picture}.png").read_bytes().startswith(b"\x89PNG")
    (run,) = results["runs"]
    assert list(run["forms"]) == ["per-example", "batch 128, shuffled", "batch 128, sorted"]
    selected = run["forms"]["per-example"]["selected"]
    assert selected == sorted(selected, reverse=True) and 0 < selected[-1] < selected[0] < 1
    shuffled, by_class = run["forms"]["batch 128, shuffled"], run["forms"]["batch 128, sorted"]
    assert len(shuffled["spearman_by_layer"]["f/r"]) == 41
    # The forgotten digit is one class, which sorting by class leaves in its order; the retained ones cancel less.
    assert shuffled["scale"]["f"] == by_class["scale"]["f"] < 1
    assert shuffled["scale"]["r"] < by_class["scale"]["r"] < 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quick_run_of_the_memory_study(memory_study: ModuleType, tmp_path: Path) -> None:
    memory_study.main(["--quick", "--root", str(tmp_path)])
    results = json.loads((tmp_path / memory_study.RESULTS).read_text())
    peaks, logits = results["peak_bytes"], results["logits_bytes"][-1]
    page = (tmp_path / memory_study.PAGE).read_text()
    assert page == memory_study.fill(page, memory_study.regions(results))
    assert (tmp_path / memory_study.IMAGE).read_bytes().startswith(b"\x89PNG")
    assert peaks["released"][-1] > 1.8 * logits, "the logits' softmax, and what becomes of it"
    assert logits < peaks["ours, from logits"][-1] < 1.5 * logits
    assert peaks["ours"][-1] < logits
