"""The settings of a dampening as options of a command, and its report as JSON."""

import argparse
from typing import Any

from unlearn_fast._report import DampenCounts, DampenReport

SETTINGS = ("alpha", "lam", "exponent", "cap", "floor")


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--alpha", type=float, required=True, help="selection threshold: f > alpha * r (published for images: 10)"
    )
    parser.add_argument("--lam", type=float, default=1.0, help="dampening constant (default: 1)")
    parser.add_argument("--exponent", type=float, default=1.0, help="power of the ratio lam * r / f (default: 1)")
    parser.add_argument("--cap", type=float, default=1.0, help="upper limit of the factor (default: 1)")
    parser.add_argument("--floor", type=float, default=0.0, help="lower limit of the factor (default: 0)")


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in SETTINGS}


def as_json(report: DampenReport) -> dict[str, Any]:
    """A mean over nothing is null."""
    return {
        "total": _counts(report.total),
        "parameters": {name: _counts(counts) for name, counts in report.parameters.items()},
        "without_importance": list(report.without_importance),
        "tied": report.tied,
    }


def _counts(counts: DampenCounts) -> dict[str, Any]:
    return counts._asdict() | {"mean_factor": counts.mean_factor if counts.selected else None}
