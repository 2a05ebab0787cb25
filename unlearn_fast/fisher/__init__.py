"""Diagonal Fisher information: importances of parameters, exact per example."""

from unlearn_fast.fisher.coverage import coverage
from unlearn_fast.fisher.diagonal import diagonal_fisher
from unlearn_fast.fisher.gradients import Convolution, Dense, Outer, Rows, Scaled
from unlearn_fast.fisher.importance import Importance
from unlearn_fast.fisher.losses import WeightedLosses, causal_lm_losses, classification_losses, output_norm_losses
from unlearn_fast.fisher.rules import Use, rule_for

__all__ = [
    "Convolution",
    "Dense",
    "Importance",
    "Outer",
    "Rows",
    "Scaled",
    "Use",
    "WeightedLosses",
    "causal_lm_losses",
    "classification_losses",
    "coverage",
    "diagonal_fisher",
    "output_norm_losses",
    "rule_for",
]
