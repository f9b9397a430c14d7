"""Score by stable rank, ‖W‖²_F / σ₁²: the lower it is against a random matrix of the same shape, the more bits.

A low stable rank means that the energy lies in few directions. In the view of heavy-tailed
self-regularization (Martin and Mahoney, arXiv 1810.01075), in which α is read too, training is what moves
a matrix from the bulk of a random one to such directions, so the matrix holds more of what was learned.
That direction is our reading: no source allocates bits by it, and one could argue the opposite, that
few directions are easily kept.

A Gaussian m × n matrix has the stable rank m·n / (√m + √n)² (Bai and Yin, 1993). It is divided by, so that
projections of different shape can be compared: score ∝ [m·n / (√m + √n)²] / stable rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphaq.nouns.matrix import MatrixRef
from alphaq.research.statistics import WeightStatistics


def score(matrices: Sequence[MatrixRef], statistics: Sequence[WeightStatistics]) -> np.ndarray:
    """A random matrix's stable rank over this one's, over the median; float64 [matrices], larger deserves more bits."""
    values = np.array(
        [
            matrix.parameters / sum(side**0.5 for side in matrix.shape) ** 2 / one.stable_rank
            for matrix, one in zip(matrices, statistics, strict=True)
        ]
    )
    return values / np.median(values)
