"""What a matrix costs in a typical model, where the model itself cannot be run: of its weights only a share is read.

    loss = place(layer, projection) · πₑ · Σ(w − ŵ)² / Σw² · parameters

πₑ is the routing prior over its mean in the layer (router.py), which is computed from routers and norms. `place` is
what the Fisher information of five trained models has in common (geometric means, docs/research/log.md): the first and
the last layer count more than those between, `down` more than `gate` and `up`. The nats that a loss comes to differ
between them by a factor of 170, so it is in proportion only; errors as large as the weights cost 1 for each weight.
"""

from __future__ import annotations

import numpy as np

from alphaq.sensitivity.base import Evidence
from alphaq.sensitivity.router import relative_use

FIRST_LAYER, LAST_LAYER = 3.5, 3.25
PROJECTIONS = {"down": 2.0, "up": 0.75}


def losses(evidence: Evidence) -> np.ndarray:
    """Expected loss, float64 [matrices, choices]."""
    return (_places(evidence) * relative_use(evidence) * evidence.weights)[:, None] * evidence.relative_errors


def _places(evidence: Evidence) -> np.ndarray:
    """What each matrix' place counts, float64 [matrices]; 1 for an average weight."""
    layers = np.array([-1 if matrix.layer is None else matrix.layer for matrix in evidence.matrices])
    places = np.array([PROJECTIONS.get(matrix.projection or "", 1.0) for matrix in evidence.matrices])
    places *= np.where(layers == layers.min(), FIRST_LAYER, np.where(layers == layers.max(), LAST_LAYER, 1.0))
    return places / np.average(places, weights=evidence.weights)
