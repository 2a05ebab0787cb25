"""Under `make test` the smallest cases run once, checked; `--full --benchmark-enable` times the standard shapes."""

from collections.abc import Callable

import pytest
import torch

from unlearn_fast.benchmarking import cases
from unlearn_fast.benchmarking.case import Case, Entrant, Inputs, Verdict, make_inputs
from unlearn_fast.benchmarking.measure import ROUNDS, WARM_UP


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: the standard shapes instead of the smallest")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `run_case` runs once for every implementation in every case of the operator in its name."""
    if "run_case" not in metafunc.fixturenames:
        return
    operator = metafunc.function.__name__.removeprefix("test_")
    chosen = cases.full() if metafunc.config.getoption("--full") else cases.smallest()
    entrants = [(case, entrant) for case in chosen if case.operator == operator for entrant in case.entrants()]
    pairs = [(case, entrant) for case, entrant in entrants if not entrant.less]  # a difference is not one run's time
    assert pairs, f"no case of {operator}"
    metafunc.parametrize(("case", "entrant"), pairs, ids=[f"{case.name}-{entrant.name}" for case, entrant in pairs])


@pytest.fixture
def run_case(benchmark: Callable, case: Case, entrant: Entrant) -> Callable[[], None]:
    """Checks an implementation on the inputs, and then times it on them."""

    def run() -> None:
        torch.compiler.reset()
        inputs = make_inputs(case)
        verdict = _verdict(case, entrant, inputs)
        if entrant.kind == "library" and verdict.failure:  # a finding, and no failure of ours
            pytest.skip(f"not timed: {verdict.failure}")
        assert not verdict.failure, f"not timed: {verdict.failure}"
        benchmark.group = case.name
        benchmark.extra_info.update(case.counted()._asdict(), threads=torch.get_num_threads(), units=entrant.units)
        benchmark.pedantic(entrant.run, setup=lambda: ((case.fresh(inputs),), {}), rounds=ROUNDS, warmup_rounds=WARM_UP)

    return run


def _verdict(case: Case, entrant: Entrant, inputs: Inputs) -> Verdict:
    try:
        return case.verdict(entrant, entrant.run(case.fresh(inputs)), entrant.exact(case.fresh(inputs)))
    except ModuleNotFoundError as missing:
        if entrant.kind != "library":
            raise
        return Verdict(float("inf"), str(missing))
