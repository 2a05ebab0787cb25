"""What benchmarks/study_importance.py found, as Markdown: every number in docs/importance_study.md comes from here."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

# The demo's targets.
FORGOTTEN, LOST = 0.1, 0.02
EXACT = "per-example"
USUAL = 10.0  # the published alpha for a ResNet-18


def regions(results: dict[str, Any]) -> dict[str, str]:
    """Name of a marked region of the page -> its text."""
    return {
        "setting": _setting(results),
        "agreement": _agreement(results["runs"]),
        "overlap": _overlap(results),
        "forgetting": _forgetting(results, "runs"),
        "unsmoothed": _forgetting(results, "unsmoothed"),
    }


Curve = Sequence[dict[str, float] | None]  # a point an alpha; None where the model was lost at a larger one


def best(curve: Curve) -> int:
    """Position of the alpha that parts retained and forgotten accuracy most; the largest of equal ones."""
    scores = [point["retained"] - point["forgotten"] if point else -1.0 for point in curve]
    return max(range(len(scores)), key=lambda i: (scores[i], i))


def met(run: dict[str, Any], form: str) -> list[bool]:
    """For every alpha, whether both of the demo's targets are met."""
    least = run["before"]["retained"] - LOST
    points = run["forms"][form]["curve"]
    return [point is not None and point["forgotten"] <= FORGOTTEN and point["retained"] >= least for point in points]


def _setting(results: dict[str, Any]) -> str:
    runs, alphas, model = results["runs"], results["alphas"], results["plan"]["model"]
    machine, versions = results["machine"], results["versions"]
    images = {part: _range((run["examples"][part] for run in runs), str) for part in ("forget", "retain")}
    facts = {
        "model": f"the demo's ResNet-18 of width {model['width']}, {runs[0]['parameters']:,} parameters",
        "models": ", ".join(f"seed {run['seed']} forgets the {run['digit']}" for run in runs),
        "training images": f"{images['forget']} to forget; {images['retain']} to retain, the reference",
        "settings": f"lam {model['lam']:g}; {len(alphas)} values of alpha from {alphas[0]:g} to {alphas[-1]:,.0f}",
        "machine": f"CPU, {machine['processor']}, {machine['processes']} processes of {machine['threads']} thread each",
        "software": f"torch {versions['torch']}, unlearn_fast {versions['unlearn_fast']}",
        "processor time": f"{results['processor_seconds'] / 60:.0f} minutes",
    }
    return "\n".join(f"* {name}: {fact}" for name, fact in facts.items())


def _agreement(runs: list[dict[str, Any]]) -> str:
    rows = []
    for form in _batch_forms(runs):
        found = [run["forms"][form] for run in runs if form in run["forms"]]
        lowest = [min(v for v in one["spearman_by_layer"]["f/r"].values() if v is not None) for one in found]
        rows.append(
            [
                form,
                *(_spread((one["spearman"][name] for one in found), _two) for name in ("f", "r", "f/r")),
                _spread(lowest, _two),
                *(_spread((one["scale"][name] for one in found), _digits) for name in ("f", "r", "f/r")),
            ]
        )
    head = ["form", "Spearman f", "r", "f/r", "f/r, lowest layer", "size of f", "of r", "of f/r"]
    return _table(head, rows)


def _overlap(results: dict[str, Any]) -> str:
    shown = [at for at, alpha in enumerate(results["alphas"]) if alpha in (1, 10, 100, 1000)]
    runs = results["runs"]
    rows = []
    for form in _batch_forms(runs):
        row = [form]
        for key in ("jaccard", "jaccard_same_number"):
            row += [
                _spread((run["forms"][form][key][at] for run in runs if form in run["forms"]), _two) for at in shown
            ]
        rows.append(row)
    names = [f"alpha {results['alphas'][at]:g}" for at in shown]
    share = ["selected by per-example"]
    share += [_spread((run["forms"][EXACT]["selected"][at] for run in runs), _percent) for at in shown]
    rows.append(share + [""] * len(shown))
    return _table(["form", *names, *(f"as many as at {name}" for name in names)], rows)


def _forgetting(results: dict[str, Any], kind: str) -> str:
    runs, alphas = results[kind], results["alphas"]
    usual = alphas.index(USUAL)
    rows = [["before", *[""] * 3, *_measured([run["before"] for run in runs]), ""]]
    if runs[0]["retrained"]:
        rows.append(["retrained without the digit", *[""] * 3, *_measured([run["retrained"] for run in runs]), ""])
    for form in [EXACT, *_batch_forms(runs)]:
        if form != EXACT and runs[0]["forms"][form]["size"] == 1:
            continue
        curves = [run["forms"][form]["curve"] for run in runs]
        at_usual = [curve[usual] for curve in curves]
        at_best = [curve[best(curve)] for curve in curves]
        rows.append(
            [
                form,
                *_measured(at_usual)[:2],
                _range((alphas[best(curve)] for curve in curves), _digits),
                *_measured(at_best),
                _window([met(run, form) for run in runs], alphas),
            ]
        )
    head = ["form", f"retained at alpha {USUAL:g}", "forgotten", "best alpha", "retained", "forgotten", "membership"]
    return _table([*head, "targets met in all models"], rows)


def _window(met_by_run: list[list[bool]], alphas: Sequence[float]) -> str:
    common = [alpha for alpha, *all_met in zip(alphas, *met_by_run, strict=True) if all(all_met)]
    if not common:
        return "at no alpha"
    gaps = sum(common[0] <= alpha <= common[-1] for alpha in alphas) - len(common)
    return f"alpha {_range(common, _digits)}" + (f", with {gaps} gaps" if gaps else "")


def _batch_forms(runs: list[dict[str, Any]]) -> list[str]:
    return [form for form in runs[0]["forms"] if form != EXACT]


def _measured(points: Curve) -> list[str]:
    return [
        _spread((point and point[name] for point in points), _percent)
        for name in ("retained", "forgotten", "membership")
    ]


def _spread(values: Iterable[float | None], text: Callable[[float], str]) -> str:
    """Mean and, in parentheses, smallest and largest, where they read differently."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    mean, lowest, highest = text(sum(known) / len(known)), text(min(known)), text(max(known))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def _range(values: Iterable[float], text: Callable[[float], str]) -> str:
    known = list(values)
    lowest, highest = text(min(known)), text(max(known))
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _digits(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if 0 < value < 1 else f"{100 * value:.0f} %"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
