"""Score by column outliers, maxⱼ max|W₍:,ⱼ₎| / mean|W₍:,ⱼ₎|: the linear-layer scorer of QuantMoE-Bench.

A weight that towers over its input column dominates a quantizer's scale. The source gives the layers with
the largest score the extra bits (arXiv 2406.08155).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphaq.nouns.matrix import MatrixRef
from alphaq.research.statistics import WeightStatistics


def score(matrices: Sequence[MatrixRef], statistics: Sequence[WeightStatistics]) -> np.ndarray:
    """Outlier score over its median, float64 [matrices]; larger deserves more bits."""
    values = np.array([one.outlier for _, one in zip(matrices, statistics, strict=True)])
    return values / np.median(values)
