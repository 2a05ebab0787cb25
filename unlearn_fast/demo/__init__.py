"""The demo: a picture classifier forgets by SSD, a language model by FLAT, and a table says how well."""

import json
import time
from pathlib import Path
from typing import Any

import torch


def main(out: Path, *, quick: bool = False, show_progress: bool = True) -> dict[str, Any]:
    """Runs both parts, prints the closing table, and writes `demo.json`, `demo_ssd.png` and `demo_flat.png` to `out`.

    `quick` makes models and training smaller and nothing else different. The global random state is left as it was.
    Needs scikit-learn, transformers and matplotlib: `pip install unlearn_fast[demo]`.
    """
    from unlearn_fast.demo import flat, plots, ssd, table

    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        forgotten_digit = ssd.run(ssd.QUICK if quick else ssd.Settings(), show_progress)
        forgotten_authors = flat.run(flat.QUICK if quick else flat.Settings(), show_progress)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    plots.draw_ssd(forgotten_digit, out / "demo_ssd.png")
    plots.draw_flat(forgotten_authors, out / "demo_flat.png")
    results = {
        "quick": quick,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "met": all(target["met"] for part in (forgotten_digit, forgotten_authors) for target in part["targets"]),
        "ssd": forgotten_digit,
        "flat": forgotten_authors,
    }
    (out / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table.text(results))
    print(f"\nWritten to {out}: demo.json, demo_ssd.png, demo_flat.png")
    return results
