"""Importance from the tail exponent: F(α) = (α₀/α)^γ, α₀ the median α of the matrices planned.

A heavier tail (smaller α) marks a better-trained matrix (heavy-tailed self-regularization), whose
error is taken to cost more. γ = 0 ignores the spectra.
"""

from __future__ import annotations

import numpy as np

from alphaq.errors import BudgetError
from alphaq.sensitivity.base import Evidence

SPREAD = 0.15
"""Standard deviation of ln F that `--gamma auto` aims at (docs/research/log.md has the grid it was read from)."""


def alpha_importance(alphas: np.ndarray, gamma: float) -> np.ndarray:
    """F(α) of each matrix, float64 [n]; 1 where α is NaN (undefined), the importance of a median matrix.

    Raises BudgetError if γ is so large that the importances leave the range of floats.
    """
    defined = ~np.isnan(alphas)
    importance = np.ones(len(alphas))
    if defined.any():
        with np.errstate(over="ignore"):
            importance[defined] = (np.median(alphas[defined]) / alphas[defined]) ** gamma
    if not np.isfinite(importance).all():
        raise BudgetError(f"--gamma {gamma:g} overflows (α₀/α)^γ. Use a smaller one; the paper's best are 10 to 200.")
    return importance


def automatic_gamma(alphas: np.ndarray) -> float:
    """γ at which ln F has the spread `SPREAD`, so that one setting suits narrow and wide distributions of α.

    0 if fewer than two α are defined or all are equal: there is nothing to tell apart.
    """
    defined = alphas[~np.isnan(alphas)]
    spread = float(np.log(defined).std()) if len(defined) > 1 else 0.0
    return SPREAD / spread if spread > 1e-9 else 0.0


def resolved_gamma(evidence: Evidence) -> float:
    """γ as given, or the one that suits the spread of α."""
    return automatic_gamma(evidence.alphas) if evidence.gamma == "auto" else evidence.gamma


def losses(evidence: Evidence) -> np.ndarray:
    """F(α)·Σ(w − ŵ)², float64 [matrices, choices]."""
    return alpha_importance(evidence.alphas, resolved_gamma(evidence))[:, None] * evidence.errors
