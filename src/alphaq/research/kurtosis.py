"""Score by kurtosis, E[(w − μ)⁴] / Var²: heavier-tailed weights lose more to a uniform grid.

A group's range is set by its largest weight, so at equal variance heavier tails mean wider steps for all
the others. The best single data-free predictor of a tensor's loss in a study of models with 512 experts
(Spearman 0.795; baa.ai, 2026).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphaq.nouns.matrix import MatrixRef
from alphaq.research.statistics import WeightStatistics


def score(matrices: Sequence[MatrixRef], statistics: Sequence[WeightStatistics]) -> np.ndarray:
    """Kurtosis over its median, float64 [matrices]; larger deserves more bits."""
    values = np.array([one.kurtosis for _, one in zip(matrices, statistics, strict=True)])
    return values / np.median(values)
