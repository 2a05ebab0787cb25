"""What dampening costs, undoing it, choosing its alpha, and sweeping its settings.

`python benchmarks/bench_dampen.py` prints every case of the family, with peak memory, as `unlearn_fast bench` with its
operators' names does, and takes the same options; the cases are in `unlearn_fast/benchmarking/dampening.py`.
Checkpoints on disk have a benchmark of their own, `bench_checkpoint.py`.
"""

import sys
from collections.abc import Callable

from unlearn_fast.benchmarking import dampening
from unlearn_fast.cli import main


def test_dampen_(run_case: Callable[[], None]) -> None:
    run_case()


def test_undo_(run_case: Callable[[], None]) -> None:
    run_case()


def test_alpha_for_percentile(run_case: Callable[[], None]) -> None:
    run_case()


def test_selection_curve(run_case: Callable[[], None]) -> None:
    run_case()


def test_top_fraction_mask(run_case: Callable[[], None]) -> None:
    run_case()


def test_sweep(run_case: Callable[[], None]) -> None:
    run_case()


if __name__ == "__main__":
    family = dict.fromkeys(case.operator for case in dampening.full())
    sys.exit(main(["bench", *family, *sys.argv[1:]]))
