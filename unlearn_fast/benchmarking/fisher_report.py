"""One table a model: what the exact Fisher costs over one ordinary forward and backward."""

from unlearn_fast import info
from unlearn_fast.benchmarking.measure import Outcome, Timing

ALLOWED = 64 << 20  # bytes that ours may take beyond an ordinary forward and backward and one importance

EXPLAINED = """time: over one ordinary forward and backward of the same batches; each further batch: the time of
twice the batches less that of the batches, over their number; error: of the worst parameter's importance, in norm,
against one example at a time in float64; missing: share of the parameters without a result;
memory: peak beyond model and batches for B and for 2 B examples, and what of it an ordinary one does not take"""


def table(outcome: Outcome) -> list[str]:
    """The lines of one model."""
    case = outcome.case
    facts, ordinary = case.facts(), outcome.baseline.median
    small, large = facts["weighed_batch_sizes"]
    memory = f"MiB, B {small}", f"B {large}", "beyond", "beyond"
    header = "", " time", f"{'ms a batch':>10}", "  ±", "error", "missing", *memory
    size = f"{facts['parameters']:,} parameters, importance {_mib(facts['importance_bytes'])} MiB"
    size += f", error at most {facts['tolerance']:.0e}"
    lines = [f"{case.name}  ({size})"]
    lines += [f"  {line}" for line in info.table(header, [_row(outcome, timing) for timing in outcome.timings])]
    notes = {timing.name: "; ".join(filter(None, (timing.failure, timing.note))) for timing in outcome.timings}
    lines += [f"  {name}: {note}" for name, note in notes.items() if note]
    if ordinary:
        share = outcome.ceiling / ordinary
        lines.append(f"  {case.baseline}: {share:.0%} of the rate of this machine's matrix product")
    return [*lines, *_memory(outcome, facts["importance_bytes"])]


def beyond(outcome: Outcome, timing: Timing) -> list[int | None]:
    """Peak memory above that of the ordinary forward and backward, one for each batch size."""
    pairs = zip(timing.peaks, outcome.baseline.peaks, strict=False)
    return [own - base if own is not None and base is not None else None for own, base in pairs]


def plus_minus(timing: Timing) -> str:
    """The spread of its rounds."""
    return f"±{timing.spread:.1%}" if timing.spread is not None else ""


def _row(outcome: Outcome, timing: Timing) -> tuple[str, ...]:
    ratio = outcome.over_baseline(timing)
    peaks = [_mib(peak) for peak in timing.peaks] or ["", ""]
    above = [_mib(peak, sign=True) for peak in beyond(outcome, timing)] or ["", ""]
    return (
        timing.name,
        f"{ratio:5.2f}" if ratio else "    -",
        f"{timing.median * 1e3:10.1f}" if timing.median else "not timed",
        plus_minus(timing),
        f"{timing.error:.1e}" if timing.error is not None else "",
        f"{timing.missing:7.2%}" if timing.missing else "",
        *peaks,
        *above,
    )


def _memory(outcome: Outcome, importance: int) -> list[str]:
    above = beyond(outcome, outcome.timings[0])
    if not above or None in above:
        return []
    within = all(a is not None and a <= importance + ALLOWED for a in above)
    bound = f"one importance and {ALLOWED >> 20} MiB beyond an ordinary forward and backward"
    return [f"  ours stays within {bound}" if within else f"  ours takes MORE than {bound}"]


def _mib(size: int | None, *, sign: bool = False) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**20:+8.1f}" if sign else f"{size / 2**20:.1f}"
