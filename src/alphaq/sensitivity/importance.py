"""Importance from the tail exponent: F(α) = (α₀/α)^γ, α₀ the median α of the matrices planned.

A heavier tail (smaller α) marks a better-trained matrix (heavy-tailed self-regularization), whose
error is taken to cost more. γ = 0 ignores the spectra.
"""

from __future__ import annotations

import numpy as np

from alphaq.errors import BudgetError
from alphaq.records import Spectrum


def alpha_importance(spectra: list[Spectrum], gamma: float) -> np.ndarray:
    """F(α) of each matrix, float64 [n]; 1 where α is undefined, the importance of a median matrix.

    Raises BudgetError if γ is so large that the importances leave the range of floats.
    """
    alphas = np.array([np.nan if found.alpha is None else found.alpha for found in spectra])
    defined = ~np.isnan(alphas)
    importance = np.ones(len(alphas))
    if defined.any():
        with np.errstate(over="ignore"):
            importance[defined] = (np.median(alphas[defined]) / alphas[defined]) ** gamma
    if not np.isfinite(importance).all():
        raise BudgetError(f"--gamma {gamma:g} overflows (α₀/α)^γ. Use a smaller one; the paper's best are 10 to 200.")
    return importance
