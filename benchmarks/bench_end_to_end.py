"""A whole SSD of a vision model, a whole FLAT training step of a language model: what a user waits for.

`python benchmarks/bench_end_to_end.py` prints one table a case, as `unlearn_fast bench ssd_ flat_training_step` does,
and takes the same options; the cases are in `unlearn_fast/benchmarking/end_to_end.py`.
"""

import sys
from collections.abc import Callable

from unlearn_fast.cli import main


def test_ssd_(run_case: Callable[[], None]) -> None:
    run_case()


def test_flat_training_step(run_case: Callable[[], None]) -> None:
    run_case()


if __name__ == "__main__":
    sys.exit(main(["bench", "ssd_", "flat_training_step", *sys.argv[1:]]))
