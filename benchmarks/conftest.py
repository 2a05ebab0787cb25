"""Under `make test` the smallest cases run once, checked; `--full --benchmark-enable` times the standard shapes."""

from collections.abc import Callable

import pytest
import torch

from unlearn_fast.benchmarking import cases
from unlearn_fast.benchmarking.case import Case, Entrant
from unlearn_fast.benchmarking.measure import ROUNDS, TOLERANCE, WARM_UP, error, make_inputs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: the standard shapes instead of the smallest")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `run_case` runs once for every implementation in every case of the operator in its name."""
    if "run_case" not in metafunc.fixturenames:
        return
    operator = metafunc.function.__name__.removeprefix("test_")
    chosen = cases.full() if metafunc.config.getoption("--full") else cases.smallest()
    pairs = [(case, entrant) for case in chosen if case.operator == operator for entrant in case.entrants()]
    assert pairs, f"no case of {operator}"
    metafunc.parametrize(("case", "entrant"), pairs, ids=[f"{case.name}-{entrant.name}" for case, entrant in pairs])


@pytest.fixture
def run_case(benchmark: Callable, case: Case, entrant: Entrant) -> Callable[[], None]:
    """Checks an implementation on the inputs, and then times it on them."""

    def run() -> None:
        torch.compiler.reset()
        inputs = make_inputs(case)
        wrong_by = error(entrant.run(case.fresh(inputs)), entrant.exact(case.fresh(inputs)))
        assert wrong_by <= TOLERANCE[case.dtype], f"wrong by {wrong_by:.1e}: not timed"
        benchmark.group = case.name
        benchmark.extra_info.update(case.cost._asdict(), threads=torch.get_num_threads())
        benchmark.pedantic(entrant.run, setup=lambda: ((case.fresh(inputs),), {}), rounds=ROUNDS, warmup_rounds=WARM_UP)

    return run
