"""The pages are made of the records: blocks, plots, and the page that documents every key of the records."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from unlearn_fast.benchmarking import cases

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks" / "results" / "h200" / "gpu.json"
SECTIONS = {
    "schema": 1,
    "steps": [{"name": "tests", "status": "passed", "seconds": 1.5, "facts": {"passed": 7}}],
    "resources": [{"name": "dampen", "architecture": 90, "registers": 40, "stack": 0, "shared": 1024}],
    "tests": {"passed": 7},
    "sanitizer": {"memcheck": "0 errors | 0 warnings"},
    "tuning": [
        {
            "kernel": "rows",
            "shape": "[8192, 32000]",
            "dtype": "bfloat16",
            "configurations": [{"configuration": f"{w} warps", "ms": w / 16, "failure": ""} for w in (4, 8)],
            "best": "4 warps",
            "shipped": "8 warps",
        }
    ],
    "floors": [{"kernel": "rows", "bytes_ms": 0.1}],
}


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pages

    return pages


def test_a_page_of_another_record_is_found(pages, monkeypatch, capsys):
    def slower(file: Path) -> dict[str, Any]:
        record = json.loads(file.read_text())
        for case in record.get("cases", []):
            if case["operator"] == "dampen_":
                case["timings"][0]["ms"] *= 2
        return record

    monkeypatch.setattr(pages, "load", slower)
    assert pages.main(["--check"]) == 1
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith("README.md, block 'dampening of benchmarks/results/cpu/dampen.json'")
    monkeypatch.setattr(pages, "digest", lambda files: "another")
    plots = [line.partition(":")[0] for line in pages.differences() if line.endswith(".svg")]
    assert len(plots) >= 3 and {"docs/images/cpu_rivals.svg", "docs/images/h200_ceiling.svg"} < set(plots)


def test_a_block_without_an_end_is_an_error(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- from benchmarks/results/cpu/flat.json: losses -->\n")
    with pytest.raises(ValueError, match=r"README\.md has 1 blocks, of which 0"):
        pages.differences()


def test_all_sections_of_a_gpus_record_are_told(pages):
    text = pages.markdown(SECTIONS)
    assert "rows | [8192, 32000] | bfloat16 | 2 | 4 warps: 0.25 ms | 8 warps: 0.5 ms |" in text
    assert "| dampen | 90 | 40 | 0 | 1024 |" in text
    assert "| memcheck | 0 errors \\| 0 warnings |" in text
    assert "passed 7" in text and "bytes_ms" in text
    record = json.loads(GPU.read_text())
    rows = [line for line in pages.markdown(record).splitlines() if line.startswith("|")]
    assert len(rows) == len(record["bench"]["cases"]) + 2
    assert pages.markdown(record) == pages.markdown(record["bench"])


def test_what_no_gpu_has_measured_is_listed(pages):
    record = json.loads(GPU.read_text())
    text = pages.WRITERS["cases"](record, "gpu.json")
    standard = {case.name for case in cases.on_gpu()}
    listed = set(re.findall(r"^\* (.*)$", text, re.MULTILINE))
    from pages_records import name

    measured = {name(case) for case in record["bench"]["cases"]}
    assert listed == standard - measured
    without = copy.deepcopy(record)
    without["bench"]["cases"] = [c for c in without["bench"]["cases"] if c["operator"] != "dampen_"]
    assert "`dampen_` (3 cases)" in " ".join(pages.WRITERS["in short"](without, "gpu.json").split())


def test_spread_is_the_interquartile_range_over_the_median(pages):
    from pages_records import spread

    assert spread({"rounds_ms": [4.0, 1.0, 2.0, 3.0, 5.0]}) == pytest.approx(2 / 3)
    assert spread({"rounds_ms": [1.0]}) is None


def test_plots_tell_their_record_and_are_the_same_each_time(pages, tmp_path):
    pytest.importorskip("matplotlib")
    from pages_plots import DRAWN

    record = json.loads(GPU.read_text())
    for kind, draw in DRAWN.items():
        files = [tmp_path / f"{kind}{i}.svg" for i in range(2)]
        for file in files:
            draw([record], "title", file, "sha256:of the record")
        assert "sha256:of the record" in files[0].read_text()
        assert files[0].read_bytes() == files[1].read_bytes()


def bench_records() -> Iterator[Any]:
    for file in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        record = json.loads(file.read_text())
        if "cases" in record or "schema" in record:  # a study's is its own
            yield pytest.param(record, id=f"{file.parent.name}/{file.stem}")


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Every key of a record, as docs/records.md writes it."""
    if isinstance(value, dict):
        for key, part in value.items():
            here = f"{path}.{key}".removeprefix(".")
            yield here
            yield from keys(part, here)
    elif isinstance(value, list):
        for part in value:
            yield from keys(part, f"{path}[]")


def documented() -> list[str]:
    return re.findall(r"^\| `([\w.*\[\]]+)` \|", (ROOT / "docs" / "records.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("record", [*bench_records(), pytest.param(SECTIONS, id="all sections")])
def test_every_key_of_a_record_is_documented(record):
    page = re.compile("|".join(re.escape(key).replace(r"\*", ".+") for key in documented()))
    for key in dict.fromkeys(keys(record)):
        assert page.fullmatch(key.removeprefix("bench.")), key


def test_every_documented_key_is_known_to_the_code():
    files = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("unlearn_fast/**/*.py")]
    words = set(re.findall(r"\w+", "".join(file.read_text() for file in files)))
    names = {key.rpartition(".")[2].removesuffix("[]") for key in documented()} - {"*"}
    assert len(names) > 60 and names <= words
