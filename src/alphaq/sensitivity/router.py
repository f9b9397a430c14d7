"""Routing prior × squared error: which experts a router would use, computed from the weights alone.

For each MoE layer draw h ~ N(0, I), scale it by the weight of the norm before the block, and let the layer's
own router choose. πₑ = E[p²·(e chosen)] is how much an error of expert e's output counts, since the layer adds
p·y. Where routing is unbalanced the prior finds the busy experts; where it is balanced, π is nearly flat and
changes little by itself. No published method that does this was found; the experiments are in docs/research/log.md.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from alphaq.sensitivity.base import Evidence


def relative_use(evidence: Evidence) -> np.ndarray:
    """πₑ over its mean in the layer, float64 [matrices]; 1 for a matrix of no expert."""
    prior = evidence.prior
    assert prior is not None  # methods that call this ask for it
    totals: dict[int, list[float]] = defaultdict(list)
    for (layer, _), use in prior.items():
        totals[layer].append(use.mean_square_weight)
    means = {layer: sum(values) / len(values) for layer, values in totals.items()}
    values = np.ones(len(evidence.names))
    for number, matrix in enumerate(evidence.matrices):
        if matrix.layer is not None and matrix.expert is not None and means.get(matrix.layer, 0.0) > 0:
            values[number] = prior[matrix.layer, matrix.expert].mean_square_weight / means[matrix.layer]
    return values


def losses(evidence: Evidence) -> np.ndarray:
    """πₑ / mean π · Σ(w − ŵ)², float64 [matrices, choices]."""
    return relative_use(evidence)[:, None] * evidence.errors
