"""Score by α alone, for the fixed shares of AlphaQ's reference: lowest quarter a width up, highest a width down."""

from __future__ import annotations

import numpy as np


def completed(alphas: np.ndarray) -> np.ndarray:
    """α of each matrix, float64 [n], the median of the defined ones where it is NaN; all 1 if none is defined."""
    defined = alphas[~np.isnan(alphas)]
    return np.where(np.isnan(alphas), np.median(defined) if len(defined) else 1.0, alphas)
