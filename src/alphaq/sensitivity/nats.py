"""Losses in nats: ½ · E[G²] · (w − ŵ)², summed over a matrix as its Fisher information says (calibration/fisher.py).

An estimate of the KL divergence per token that rounding the matrix adds, without a constant. Where a model's pass has no
gradient here, the default goes by the signal instead (signal.py).
"""

from __future__ import annotations

import numpy as np

from alphaq.calibration.fisher import Fisher
from alphaq.nouns.matrix import MatrixRef
from alphaq.sensitivity import signal
from alphaq.sensitivity.base import Evidence


def losses(evidence: Evidence) -> np.ndarray:
    """Nats per token, float64 [matrices, choices]."""
    fisher = evidence.fisher
    assert fisher is not None  # methods that call this ask for it
    means = np.array([fisher.matrices[name].mean for name in evidence.names])
    return 0.5 * means[:, None] * evidence.errors


def losses_or_signal(evidence: Evidence) -> np.ndarray:
    """Nats per token; where they are not known, what the signal makes of it, in a unit of its own."""
    return signal.losses(evidence) if evidence.fisher is None else losses(evidence)


def harm(fisher: Fisher, matrix: MatrixRef, energy: float | None) -> float:
    """Nats per token and per unit of a matrix' relative error. energy: Σw², each weight counted as its error is."""
    assert energy is not None
    return 0.5 * fisher.matrices[matrix.name].mean * energy
