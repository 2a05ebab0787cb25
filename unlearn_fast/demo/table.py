"""The closing table of the demo, plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

MODELS = {
    "before": "before",
    "ssd": "after SSD, exact importances",
    "released": "after SSD, released approximation",
    "released_tuned": "after SSD, released approximation",
    "retrained": "retrained without the digit",
}
SECONDS = {
    "training": "training",
    "importance_exact": "importances, exact",
    "importance_released": "importances, released approximation",
    "dampening_ssd": "dampening",
    "retraining": "retraining without the digit",
}


def text(results: Mapping[str, Any]) -> str:
    """Both parts, the targets, and whether they were met."""
    targets = [target for part in ("ssd", "flat") for target in results[part]["targets"]]
    return "\n".join(
        [
            "",
            *_ssd(results["ssd"]),
            "",
            *_flat(results["flat"]),
            "",
            *_aligned(["target", "wanted", "measured", "met"], [_target(target) for target in targets]),
            "",
            f"{results['seconds']:.0f} seconds in all, on {results['threads']} threads, torch {results['torch']}",
        ]
    )


def _ssd(part: Mapping[str, Any]) -> list[str]:
    settings, models = part["settings"], part["models"]
    alphas = {
        "ssd": settings["alpha"],
        "released": settings["alpha"],
        "released_tuned": settings["released_alpha"],
    }
    rows = []
    for key, title in MODELS.items():
        measured = models[key]
        dampened = f"{part['dampened']['share'][key]:.2%}" if key in alphas else ""
        percent = [f"{measured[name]:.1%}" for name in ("retained", "forgotten", "membership")]
        rows.append([title, f"{alphas[key]:g}" if key in alphas else "", dampened, *percent])
    return [
        f"SSD: a ResNet-18 of width {settings['width']} ({part['parameters']:,} parameters) that reads handwritten"
        f" digits forgets the {settings['digit']}, without training.",
        "Accuracy on test images; membership: share of the forgotten training images that an attacker takes for such.",
        *_aligned(["model", "alpha", "dampened", "other digits", f"the {settings['digit']}", "membership"], rows),
        "",
        *_aligned(["step", "seconds"], [[title, f"{part['seconds'][key]:.3f}"] for key, title in SECONDS.items()]),
    ]


def _flat(part: Mapping[str, Any]) -> list[str]:
    rows = [
        [f"{name} answers", *(f"{part[when][name][mean]:.4f}" for mean in ("geometric", "mean") for when in WHEN)]
        for name in part["before"]
    ]
    said = [[entry["question"] + "?", *(entry[key] for key in ("truth", *WHEN))] for entry in part["samples"].values()]
    return [
        f"FLAT: a language model ({part['parameters']:,} parameters) that knows made-up authors forgets"
        f" {part['settings']['forget']} of them,",
        f"from their questions alone, in {part['steps']} steps ({part['seconds']['forgetting']:.1f} s; training took"
        f" {part['seconds']['training']:.1f} s).",
        "Probability of an answer: geometric mean over its tokens, and arithmetic mean.",
        *_aligned(["probability of", "geom. before", "after", "arith. before", "after"], rows),
        "",
        *_aligned(["question", "truth", "sampled before", "sampled after"], said, left=4),
    ]


WHEN = ("before", "after")


def _target(target: Mapping[str, Any]) -> list[str]:
    sign = "<=" if target["at_most"] else ">="
    met = "yes" if target["met"] else "NO"
    return [target["name"], f"{sign} {target['limit']:.0%}", f"{target['measured']:.1%}", met]


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns as wide as their longest cell; the first `left` of them flush left, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [list(head), ["-" * width for width in widths], *map(list, rows)]
    return [
        "  "
        + "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
