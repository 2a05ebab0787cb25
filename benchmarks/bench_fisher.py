"""What the exact per-example Fisher of whole models costs, in ordinary forwards and backwards.

`python benchmarks/bench_fisher.py` prints one table a model, as `unlearn_fast bench diagonal_fisher` does, and takes
the same options; its cases are in `unlearn_fast/benchmarking/fisher.py`.
"""

import sys
from collections.abc import Callable

from unlearn_fast.cli import main


def test_diagonal_fisher(run_case: Callable[[], None]) -> None:
    run_case()


if __name__ == "__main__":
    sys.exit(main(["bench", "diagonal_fisher", *sys.argv[1:]]))
