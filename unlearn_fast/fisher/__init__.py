"""Diagonal Fisher information: importances of parameters, exact per example."""

from unlearn_fast.fisher.diagonal import diagonal_fisher
from unlearn_fast.fisher.importance import Importance
from unlearn_fast.fisher.losses import causal_lm_losses, classification_losses, output_norm_losses

__all__ = ["Importance", "causal_lm_losses", "classification_losses", "diagonal_fisher", "output_norm_losses"]
