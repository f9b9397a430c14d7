"""Score by AIMER, mean|w| / root mean square over all matrices of an expert: the lower it is, the more bits.

The ratio is 1 if all weights have one magnitude, √(2/π) ≈ 0.798 for a Gaussian, and less the heavier the
tails, down to 1/√N for a single non-zero weight among N. AIMER (arXiv 2603.18492) prunes, layer by layer,
the experts with the *highest* ratio: even weights mark the expert that is missed least. What may be
removed first may be coarse first, hence the score is the inverse ratio. Two steps are ours: bits in place
of removal, and comparing experts of different layers, where the source ranks within each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from alphaq.nouns.matrix import MatrixRef
from alphaq.research.statistics import WeightStatistics


def score(matrices: Sequence[MatrixRef], statistics: Sequence[WeightStatistics]) -> np.ndarray:
    """Root mean square over mean|w| of the expert, over the median; float64 [matrices], larger deserves more bits.

    All matrices of an expert score the same; a matrix of no expert is ranked alone, and zeros as the
    least important.
    """
    members: dict[object, list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        members[matrix.name if matrix.expert is None else (matrix.layer, matrix.expert)].append(number)
    counts = np.array([float(matrix.parameters) for matrix in matrices])
    absolute = counts * [one.mean_absolute for _, one in zip(matrices, statistics, strict=True)]
    squares = counts * [one.root_mean_square**2 for one in statistics]
    values = np.ones(len(matrices))
    for numbers in members.values():
        mean_absolute = absolute[numbers].sum() / counts[numbers].sum()
        if mean_absolute > 0:
            values[numbers] = math.sqrt(squares[numbers].sum() / counts[numbers].sum()) / mean_absolute
    return values / np.median(values)
