"""`make gpu-check`, rehearsed: what it reads off the assembler, in which order it works, and what it leaves behind."""

import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
ASSEMBLER = """
[1/2] Building CUDA object CMakeFiles/_cuda.dir/csrc/cuda/dampen.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPfi' for 'sm_90'
ptxas info    : Function properties for _Z1fPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 118 registers, used 1 barriers, 256 bytes smem, 3524 bytes cmem[0]
ptxas info    : Compile time = 41.2 ms
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90a'
ptxas info    : Function properties for _Z1gPf
    48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 48 bytes cumulative stack size
"""
CLEAN = ASSEMBLER.replace("40 bytes spill stores, 44 bytes spill loads", "0 bytes spill stores, 0 bytes spill loads")
INFO = {
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "machine": {"gpus": ["A card"]},
    "build": {},
    "operators": {},
}
BENCH = json.loads((ROOT / "benchmarks" / "results" / "h200" / "gpu.json").read_text())["bench"]
TUNED = [
    {
        "kernel": "scale_",
        "shape": "[8]",
        "dtype": "float32",
        "configurations": [
            {"configuration": c, "ms": ms, "failure": ""} for c, ms in (("4 warps", 2.0), ("8 warps", 1.0))
        ],
        "best": "8 warps",
        "shipped": "4 warps",
    }
]


@pytest.fixture
def gpu_check(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_check

    return gpu_check


@pytest.fixture
def commands(gpu_check, monkeypatch) -> list[list[str]]:
    """What it would run; told as if all of it went well."""
    ran: list[list[str]] = []

    def run(command, *, stdout, stderr, cwd, timeout, env):
        ran.append(command)
        text = " ".join(command)
        if "setup.py" in text:
            assert "-DCMAKE_CUDA_ARCHITECTURES=90" in env["CMAKE_ARGS"] and "-Xptxas=-v" in env["CMAKE_ARGS"]
        printed = {"setup.py": CLEAN, " info ": json.dumps(INFO), "pytest": "F\n7 passed, 2 skipped in 1.0s"}
        for word, rows in {" bench ": BENCH, "gpu_tune": TUNED, "resources": [], "traffic": []}.items():
            if word in text:
                Path(command[-1]).write_text(json.dumps(rows))
        told = next((t for word, t in printed.items() if word in text), "").encode()
        return SimpleNamespace(stdout=told + b"========= ERROR SUMMARY: 0 errors\n", returncode=0)

    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": run}))
    monkeypatch.setattr(gpu_check.gpu_build, "clean", lambda: None)
    return ran


@pytest.fixture
def card(gpu_check, monkeypatch) -> None:
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "gpu", lambda: {"name": "A card"})
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name if name == "compute-sanitizer" else None)


def record(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())


def test_what_the_assembler_tells(gpu_check):
    f, g = gpu_check.gpu_build.told_by_the_assembler(ASSEMBLER)
    assert f["name"] in ("f(float*, int)", "_Z1fPfi") and g["architecture"] == 90
    assert (f["registers"], f["stack"], f["spill_stores"], f["shared"]) == (118, 0, 0, 256)
    assert (g["registers"], g["stack"], g["spill_stores"], g["spill_loads"], g["shared"]) == (255, 48, 40, 44, 0)


def test_on_a_gpu(gpu_check, commands, card, tmp_path):
    assert gpu_check.main([str(tmp_path)]) == 0
    found = record(tmp_path)
    names = ["build", "environment", "tests", "benchmarks", "tuning", "memcheck", "racecheck", "initcheck"]
    assert [step["name"] for step in found["steps"]] == names
    assert {step["status"] for step in found["steps"]} == {"passed"}
    assert found["environment"]["machine"] == INFO["machine"] and found["environment"]["gpu"] == {"name": "A card"}
    assert [row["registers"] for row in found["resources"]] == [118, 255]
    assert found["tests"]["passed"] == 7 and "tests/test_operators_gpu.py" in found["tests"]["files"]
    assert found["bench"] == BENCH and found["tuning"] == TUNED
    assert found["sanitizer"] == dict.fromkeys(names[-3:], "ERROR SUMMARY: 0 errors")
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"gpu.json", "gpu.md", "build.txt", "tests.txt", "bench.txt", "sanitizer.txt"}
    page = (tmp_path / "gpu.md").read_text()
    assert "`dampen_`" in page and "8 warps" in page and len(commands) == len(names)


def test_all_parts_fit_into_the_time(gpu_check):
    limits = gpu_check.LIMITS
    reserved = limits["build"] + limits["tests"] + limits["tuning"] + len(gpu_check.SANITIZERS) * limits["sanitizer"]
    assert gpu_check.LIMIT == 9 * 60 and limits["build"] <= 180 and gpu_check.LIMIT - reserved >= 90


def test_a_spilled_register_fails_and_what_follows_still_runs(gpu_check, commands, card, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.gpu_build, "told_by_the_assembler", lambda log: [{"spill_stores": 4, "name": "f"}])
    assert gpu_check.main([str(tmp_path)]) == 1
    assert record(tmp_path)["steps"][0]["status"] == "failed" and len(record(tmp_path)["steps"]) == 8


def test_a_part_that_takes_too_long_is_stopped_and_told(gpu_check, tmp_path):
    check, step = gpu_check.Check(tmp_path), gpu_check.Step("sleep")
    text = check.run(step, ["sh", "-c", "echo begun; exec sleep 60"], "tests.txt", 0.5)
    assert step.status == "stopped after 0 s" and text == "begun\n"
    assert "begun" in (tmp_path / "tests.txt").read_text()
    assert gpu_check.unfinished(gpu_check.Step("tests", step.status))
    assert not gpu_check.unfinished(gpu_check.Step("benchmarks", step.status))


def test_failing_tests_are_named(gpu_check, tmp_path, monkeypatch):
    check, step = gpu_check.Check(tmp_path), gpu_check.Step("tests")
    (tmp_path / "test_it.py").write_text("def test_right(): pass\ndef test_wrong(): assert False\n")
    check.tests(step, [str(tmp_path / "test_it.py")], 100)
    assert step.status == "failed" and step.facts == {"failed": 1, "passed": 1}
    (name,) = check.record["tests"]["failures"]
    assert name.endswith("test_it.py::test_wrong")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_runs_the_rest(gpu_check, commands, tmp_path, capsys):
    assert gpu_check.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith(f"torch {torch.__version__} sees no GPU here")
    assert [step["name"] for step in record(tmp_path)["steps"]] == ["environment", "tests", "resources", "floors"]
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "build.txt", "tests.txt", "bench.txt"}
