"""Every command, as the user types it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import unlearn_fast
from unlearn_fast import _library, scenario, scenarios
from unlearn_fast.benchmarking import cases, measure
from unlearn_fast.benchmarking.case import Case
from unlearn_fast.cli import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"unlearn_fast {unlearn_fast.__version__}\n"


def test_module_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "unlearn_fast", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["versions"]["unlearn_fast"] == unlearn_fast.__version__


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for expected in ("torch", "SIMD", "cuda build", "missing parts", *_library.SCHEMAS, *_library.missing.values()):
        assert expected in out


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == importlib.metadata.version("torch")
    assert info["machine"]["threads"] == torch.get_num_threads()
    assert info["missing"] == _library.missing
    assert info["operators"].keys() == _library.SCHEMAS.keys()
    for name, served in info["operators"].items():
        for device, entry in served.items():
            assert entry["why"]
            assert entry["implementation"] in (_library.implementation(name, device), "composed")


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["verify"])
    out = capsys.readouterr().out
    assert status == 0, out
    of_several = {"diagonal_fisher", "sweep", "undo_", "ssd_", "flat_training_step"}
    for operator in cases.operators():
        assert operator in out or operator in of_several
    assert "FAIL" not in out


def test_verify_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _only_scenarios_of(monkeypatch, "sum_grad_squared_linear_")
    assert main(["verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and all(check["passed"] for check in result["checks"])
    checked = {(check["operator"], check["dtype"]) for check in result["checks"]}
    assert {("sum_grad_squared_linear_", str(t).removeprefix("torch.")) for t in scenario.DTYPES} <= checked


@pytest.mark.parametrize(
    ("operator", "broken"),
    [
        ("sum_grad_squared_linear_", lambda out, inputs, grads, *, scale: out),
        ("sum_grad_squared_linear_", lambda *_, **__: 1 / 0),
        ("dampen_", lambda p, f, r, **_: unlearn_fast.DampenReport(("0",), (0,), torch.zeros(1, 4))),
        ("dampen_", lambda *_, **__: 1 / 0),
    ],
    ids=["sum_grad does nothing", "sum_grad raises", "dampen does nothing", "dampen raises"],
)
def test_verify_fails_with_a_broken_operator(
    operator: str, broken: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _only_scenarios_of(monkeypatch, operator)
    assert main(["verify"]) == 0
    monkeypatch.setattr(unlearn_fast, operator, broken)
    capsys.readouterr()
    assert main(["verify"]) == 1
    assert f"FAIL {operator}" in capsys.readouterr().out
    assert main(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


@pytest.mark.parametrize("factor", [1 + 1e-4, -1.0, float("nan")])
def test_verify_sees_a_slightly_wrong_value(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_scenarios_of(monkeypatch, "token_logprobs")
    right = unlearn_fast.token_logprobs
    monkeypatch.setattr(unlearn_fast, "token_logprobs", lambda *args, **options: right(*args, **options) * factor)
    assert main(["verify"]) == 1


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    operators = ["sum_grad_squared_linear_", "dampen_"]
    assert main(["bench", *operators, "--quick", "--json", str(json_file), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    result = json.loads(json_file.read_text())
    assert result["command"] == "unlearn_fast bench sum_grad_squared_linear_ dampen_ --quick"
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert set(result["ceilings"]) == {"copy_bytes_per_second", "gemm_flops_per_second"}
    expected = [case for case in cases.smallest() if case.operator in operators]
    for case, found in zip(expected, result["cases"], strict=True):
        assert case.name in out
        assert [t["name"] for t in found["timings"]] == [entrant.name for entrant in case.entrants()]
        assert found["ceiling_per_second"] > 0 and found["ceiling_spread"] >= 0
        for timing in found["timings"]:
            assert timing["failure"] == ""
            assert timing["ms"] > 0 and len(timing["rounds_ms"]) >= 9
            assert f"±{timing['spread']:.1%}" in out
            assert timing["ratio"] == pytest.approx(timing["ms"] / found["timings"][0]["ms"])
            assert timing["peak_bytes"] is not None or sys.platform != "linux"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_tells_and_writes_each_case_as_soon_as_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_at_the_second(case: Case, **options: Any) -> measure.Outcome:
        if case is not chosen[0]:
            raise KeyboardInterrupt
        return really_measure(case, **options)

    really_measure, chosen = measure.measure, cases.smallest()[:2]
    monkeypatch.setattr(cases, "smallest", lambda: chosen)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(measure, "measure", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--quick", "--json", str(tmp_path / "bench.json")])
    assert chosen[0].name in capsys.readouterr().out
    assert len(json.loads((tmp_path / "bench.json").read_text())["cases"]) == 1


def test_bench_prints_json_and_keeps_to_the_threads(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "diagonal_fisher", "--case", "MLP", "--quick", "--threads", "1", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["threads"] == 1
    assert result["command"] == "unlearn_fast bench diagonal_fisher --quick --case MLP --threads 1"
    assert [case["operator"] for case in result["cases"]] == ["diagonal_fisher"]
    timings = result["cases"][0]["timings"]
    assert {t["name"]: t["over_baseline"] for t in timings}[result["cases"][0]["baseline"]] == 1
    assert all(len(t["peaks_bytes"]) == 2 for t in timings if t["ms"] and "further" not in t["name"])


def test_bench_refuses_to_time_a_wrong_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlearn_fast, "flat_loss", lambda *args, **options: args[0].sum() * 0 + args[2].sum())
    monkeypatch.setattr(cases, "compiled", lambda function: function)
    assert main(["bench", "flat_loss", "--quick", "--json"]) == 1
    ours, *rivals = json.loads(capsys.readouterr().out)["cases"][0]["timings"]
    assert ours["failure"].startswith("wrong by") and ours["ms"] is None and ours["rounds_ms"] == []
    assert all(rival["ms"] > 0 and rival["ratio"] is None for rival in rivals)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "no_such_operator"], "no operator 'no_such_operator': choose from token_logprobs"),
        (["bench", "--json", "dampen_"], "name the operators before the options"),
        (["bench", "dampen_", "--case", "ViT"], "--case is 'ViT': no case that was asked for has it in its name"),
        (["bench", "--threads", "0"], "--threads is 0: it must be at least 1"),
        (["bench", "--plot", "picture.jpg"], "it must end in .png"),
        (["bench", "--json", "."], "is a directory: it must be a file"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "arguments", [[], ["no_such_command"], ["bench", "--no-such-option"], ["bench", "--threads", "x"]]
)
def test_unknown_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: unlearn_fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["bench", "--plot", "picture.png"], "matplotlib", "bench"),
        (["demo"], "sklearn", "demo"),
        (["demo"], "transformers", "demo"),
        (["demo"], "matplotlib", "demo"),
    ],
)
def test_missing_optional_package(
    arguments: list[str], package: str, extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert package in message and f"pip install 'unlearn_fast[{extra}]'" in message


def test_demo_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn_fast import demo

    calls = []
    monkeypatch.setattr(demo, "main", lambda out, **options: calls.append((out, options)) or {}, raising=False)
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert main(["demo"]) == 0
    assert [(out, options["quick"]) for out, options in calls] == [(tmp_path, True), (Path("out"), False)]


def _only_scenarios_of(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    from unlearn_fast import verify

    chosen = [s for s in scenarios.scenarios() if s.operator == operator]
    assert chosen
    monkeypatch.setattr(verify, "scenarios", lambda: chosen)
