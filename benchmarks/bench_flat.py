"""What FLAT and the sequence losses cost: from logits, and from hidden states and the lm_head.

`python benchmarks/bench_flat.py` prints every case of the family, with peak memory, as `unlearn_fast bench` with its
operators' names does, and takes the same options; the cases are in `unlearn_fast/benchmarking/tokens.py` and
`linear.py`.
"""

import sys
from collections.abc import Callable

from unlearn_fast.benchmarking import linear, tokens
from unlearn_fast.cli import main


def test_flat_loss(run_case: Callable[[], None]) -> None:
    run_case()


if __name__ == "__main__":
    family = dict.fromkeys(case.operator for case in [*tokens.full(), *linear.full()])
    sys.exit(main(["bench", *family, *sys.argv[1:]]))
