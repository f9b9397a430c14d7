"""Score by place alone: earlier layers before later ones, and within a layer down before gate and up.

The findings of QuantMoE-Bench (arXiv 2406.08155) as an order, without looking at a weight; its other two,
shared experts and attention before routed experts, lie outside the budget here. The order is theirs, the
equal steps between its ranks are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphaq.nouns.matrix import MatrixRef
from alphaq.sensitivity.base import Evidence


def score(matrices: Sequence[MatrixRef]) -> np.ndarray:
    """Ranks K, K − 1, …, 1 over their median, float64 [matrices]; larger deserves more bits.

    There is a rank for each (layer, down or not) that occurs. Experts of one layer tie, and so do gate and
    up. A matrix of no layer comes last.
    """
    places = [(matrix.layer is None, matrix.layer or 0, matrix.projection != "down") for matrix in matrices]
    ranks = {place: rank for rank, place in enumerate(sorted(set(places), reverse=True), start=1)}
    values = np.array([float(ranks[place]) for place in places])
    return values / np.median(values)


def ranks(evidence: Evidence) -> np.ndarray:
    """Position of each matrix in the model, whatever the order of the files; in a stats file as it is listed."""
    numbers = range(len(evidence.names))
    ranks = np.empty(len(evidence.names))
    ranks[sorted(numbers, key=lambda n: evidence.matrices[n].place) if evidence.matrices else numbers] = numbers
    return ranks


def shuffled(evidence: Evidence) -> np.ndarray:
    """A random order by `seed`, float64 [matrices]."""
    return np.random.default_rng(evidence.seed).random(len(evidence.names))[ranks(evidence).astype(int)]


def first_layers(evidence: Evidence) -> np.ndarray:
    """The model's own order, float64 [matrices]."""
    return -ranks(evidence)
