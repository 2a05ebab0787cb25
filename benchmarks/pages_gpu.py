"""The tables of a GPU's record: all of it, its cases, and the rows that stand in the README."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from pages_records import (
    absent,
    baseline,
    bench_of,
    cases_of,
    commands,
    mib,
    name,
    ours,
    paragraph,
    percent,
    ratio,
    setting,
    spread,
    table,
    times,
)

HEADER = ("case", "ours", "of the ceiling", "extra memory", "others: time over ours")
# Sections of the record after its cases -> heading.
SECTIONS = {
    "tuning": "Tuning",
    "floors": "Floors",
    "tests": "Tests",
    "sanitizer": "Sanitizer",
    "resources": "Resources of the kernels",
    "steps": "Steps",
}


def markdown(record: dict[str, Any]) -> str:
    """Everything that a record says, for people. Takes what `bench --json` writes, too."""
    bench, parts = bench_of(record), []
    if environment := record.get("environment", bench):
        machine, versions = environment["machine"], environment["versions"]
        place = f"{', '.join(machine['gpus']) or 'no GPU'}; torch {versions['torch']}, triton {versions['triton']}"
        parts.append(f"{place}; {commands(record['command'])}.")
    if bench:
        parts += [paragraph(_ceilings(bench)), table(HEADER, map(_row, bench["cases"]))]
    for key, heading in SECTIONS.items():
        if section := record.get(key):
            rows = map(_tuned, section) if key == "tuning" else section
            parts += [f"## {heading}", _any_table(rows)]
    return "\n\n".join(parts) + "\n"


def cases(record: dict[str, Any], link: str) -> str:
    """Every case of the record, and by name those that it lacks."""
    if not bench_of(record):
        return _lacking(record)
    how = paragraph(f"{setting(record, link)} {_ceilings(bench_of(record))}")
    parts = [how, table(HEADER, map(_row, cases_of(record)))]
    if missing := _unmeasured(record):
        parts.append("Standard cases that have not been measured on a GPU yet:")
        parts.append("\n".join(f"* {case.name}" for case in missing))
    return "\n\n".join(parts)


def in_short(record: dict[str, Any], link: str) -> str:
    """Of each operator and variant the case that is furthest from its ceiling, and what lacks figures."""
    if not bench_of(record):
        return _lacking(record)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in cases_of(record):
        if ours(case)["ms"]:
            groups.setdefault((case["operator"], case["variant"]), []).append(case)
    rows = []
    for group in groups.values():
        ordered = sorted(group, key=_share)
        row = _row(ordered[0])
        if len(group) > 1:
            row[2] += f", others up to {percent(_share(ordered[-1]))}"
        rows.append(row)
    return "\n\n".join([table(HEADER, rows), paragraph(f"{setting(record, link)} {_lacking(record)}")])


def _share(case: dict[str, Any]) -> float:
    return ours(case)["share_of_ceiling"] or 0.0


def _ceilings(bench: dict[str, Any]) -> str:
    """The rates behind the shares."""
    found, told = bench["ceilings"], []
    if rate := found.get("copy_bytes_per_second"):
        told.append(f"a copy at {rate / 1e12:.2f} TB/s, read and written")
    if rate := found.get("gemm_flops_per_second"):
        told.append(f"a matrix product at {rate / 1e12:.0f} TFLOP/s")
    return f"Ceilings, at most: {'; '.join(told)}." if told else ""


def _row(case: dict[str, Any]) -> list[str]:
    """A case: our time and its spread, what of the ceiling that is, our peak memory, and the rivals."""
    title = " ".join(filter(None, (f"`{case['operator']}`", case["shape"], case["dtype"], case["variant"])))
    own, unit = ours(case), baseline(case)
    if own["ms"] is None:
        return [title, f"not timed: {own['failure']}", "", "", ""]
    time = f"{own['ms']:.3f} ms" if own["ms"] < 100 else f"{own['ms']:.0f} ms"
    varied = spread(own)
    time += f" ± {varied * 100:.1f} %" if varied is not None else ""
    if unit["kind"] != "ours" and unit["ms"]:
        time += f", {times(ratio(own, unit))} of {unit['name']}"
    others = []
    for timing in case["timings"]:
        if timing["kind"] != "ours" and timing["name"] != "reference" and not absent(timing):
            others.append(f"{timing['name']} {times(ratio(timing, own)) or 'fails'}")
    share = own["share_of_ceiling"]
    return [title, time, percent(share) if share else "", _memory(case, unit), "; ".join(others)]


def _memory(case: dict[str, Any], unit: dict[str, Any]) -> str:
    """The peak beyond the inputs, and what of it is beyond that which nobody can do without."""
    peak = case["timings"][0]["peak_bytes"]
    if peak is None:
        return ""
    text = f"{mib(peak)} MiB"
    if "result_bytes" in case:
        return f"{text}, {mib(peak - case['result_bytes'])} beyond the gradients"
    if unit["kind"] != "ours" and unit["peak_bytes"] is not None:
        return f"{text}, {mib(peak - unit['peak_bytes'])} beyond {unit['name']}"
    return text


def _unmeasured(record: dict[str, Any]) -> list[Any]:
    from unlearn_fast.benchmarking.cases import on_gpu

    measured = {name(case) for case in cases_of(record) if ours(case)["ms"]}
    return [case for case in on_gpu() if case.name not in measured]


def _lacking(record: dict[str, Any]) -> str:
    """By operator, which standard cases of a GPU have no figure."""
    from unlearn_fast.benchmarking.cases import on_gpu

    missing = Counter(case.operator for case in _unmeasured(record))
    if not missing:
        return "Every standard case of a GPU has been measured."
    standard = Counter(case.operator for case in on_gpu())
    told = [f"`{operator}`{_part(many, standard[operator])}" for operator, many in missing.items()]
    return f"**Not measured on a GPU yet:** {', '.join(told)}."


def _part(many: int, standard: int) -> str:
    if many < standard:
        return f" ({many} of {standard} cases)"
    return f" ({many} cases)" if many > 1 else ""


def _tuned(row: dict[str, Any]) -> dict[str, Any]:
    """How the shipped configuration of a kernel compares with the fastest that was tried."""
    found = {str(one["configuration"]): one["ms"] for one in row["configurations"]}
    told = {key: f"{_told(row[key])}: {_told(found.get(str(row[key])))} ms" for key in ("best", "shipped")}
    return {key: row[key] for key in ("kernel", "shape", "dtype")} | {"tried": len(found)} | told


def _any_table(rows: Iterable[dict[str, Any]] | dict[str, Any]) -> str:
    """Rows with whatever keys they have; a mapping has one row a key."""
    if isinstance(rows, dict):
        rows = [{"": key, "result": value} for key, value in rows.items()]
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return table(columns, ([_told(row.get(column)) for column in columns] for row in rows))


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_told, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else " ".join(str(value).split())


WRITERS: dict[str, Callable[[dict[str, Any], str], str]] = {"cases": cases, "in short": in_short}
