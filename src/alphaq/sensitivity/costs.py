"""The cost table: expected loss of each matrix at each choice."""

from __future__ import annotations

import numpy as np

from alphaq.records import Choice, CostTable, Spectrum
from alphaq.sensitivity.importance import alpha_importance


def cost_table(
    spectra: dict[str, Spectrum],
    noise: np.ndarray,
    choices: tuple[Choice, ...],
    gamma: float,
    weights: np.ndarray,
) -> CostTable:
    """loss[i, j] = F(αᵢ) · noise[i, j] · weight[i].

    noise: mean squared error [matrices, choices]. weights: parameters of each matrix, or ones where
    shapes are unknown (the paper counts matrices).
    """
    importance = alpha_importance(list(spectra.values()), gamma)
    with np.errstate(over="ignore", invalid="ignore"):  # the solver refuses what is not finite, by name
        losses = importance[:, None] * noise * weights[:, None]
    return CostTable(tuple(spectra), choices, losses, weights)
