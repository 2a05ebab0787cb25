"""The GPU benchmarks' record as tables: `python benchmarks/gpu_tables.py benchmarks/results/<device>/bench.json`."""

import json
import sys
from pathlib import Path
from typing import Any

HEADER = "| case | ours | share of the ceiling | extra memory | others: time over ours |\n|---|---|---|---|---|"


def markdown(record: dict[str, Any]) -> str:
    """One row a case: our time, what of the ceiling that is, our peak memory beyond the inputs, and the rivals."""
    machine, versions = record["machine"], record["versions"]
    gpu = ", ".join(machine["gpus"]) or "no GPU"
    lines = [
        f"{gpu}; torch {versions['torch']}, triton {versions['triton']}; `{record['command']}`.",
        "",
        HEADER,
        *(_row(case) for case in record["cases"]),
    ]
    return "\n".join(lines) + "\n"


def _row(case: dict[str, Any]) -> str:
    title = " ".join(filter(None, (f"`{case['operator']}`", case["shape"], case["dtype"], case["variant"])))
    unit = next((t for t in case["timings"] if t["name"] == case["baseline"]), case["timings"][0])
    ours, others = case["timings"][0], []
    for timing in case["timings"]:
        if timing["kind"] == "ours" and timing is not ours and timing["ms"]:  # of the Fisher: a further batch
            ours = timing
    for timing in case["timings"]:
        if timing["kind"] != "ours" and timing["name"] != "reference":
            if timing["ms"] and ours["ms"]:
                others.append(f"{timing['name']} {timing['ms'] / ours['ms']:.2f}")
            elif "ModuleNotFoundError" not in timing["failure"]:
                others.append(f"{timing['name']} fails")
    if ours["ms"] is None:
        return f"| {title} | not timed: {ours['failure']} | | | |"
    time = f"{ours['ms']:.3f} ms" if ours["ms"] < 100 else f"{ours['ms']:.0f} ms"
    if ours.get("spread") is not None:
        time += f" ±{ours['spread']:.1%}"
    if unit["name"] != case["timings"][0]["name"] and unit["ms"]:
        time += f", {ours['ms'] / unit['ms']:.2f} of {unit['name']}"
    share = f"{ours['share_of_ceiling']:.0%}" if ours["share_of_ceiling"] else ""
    peak = case["timings"][0]["peak_bytes"]
    memory = f"{peak / 2**20:.0f} MiB" if peak is not None else ""
    return f"| {title} | {time} | {share} | {memory} | {'; '.join(others)} |"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
