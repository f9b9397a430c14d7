"""Losses in nats: ½ · E[G²] · (w − ŵ)², summed over a matrix as its Fisher information says (calibration/fisher.py).

An estimate of the KL divergence per token that rounding the matrix adds, without a constant. Where a model's pass has
no gradient here, the default goes by the signal instead (signal.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from alphaq.calibration.fisher import Fisher
from alphaq.nouns.plan import Prediction
from alphaq.sensitivity import signal
from alphaq.sensitivity.base import Evidence

MODEL_ERROR = 0.25
"""Standard deviation of the logarithm of measured over predicted KL of plans, about (docs/research/log.md)."""


def losses(evidence: Evidence) -> np.ndarray:
    """Nats per token, float64 [matrices, choices]."""
    assert evidence.harms is not None  # methods that call this ask for it
    return evidence.harms[:, None] * evidence.relative_errors


def losses_or_signal(evidence: Evidence) -> np.ndarray:
    """Nats per token; where they are not known, what the signal makes of it, in a unit of its own."""
    return signal.losses(evidence) if evidence.fisher is None else losses(evidence)


def prediction(fisher: Fisher, losses: Mapping[str, float]) -> Prediction:
    """What matrices' losses, in nats per token by name, add up to."""
    total = sum(losses.values())
    windows = sum(loss * one.windows for name, loss in losses.items() if (one := fisher.matrices.get(name)) is not None)
    spread = float(np.std(windows, ddof=1) / math.sqrt(np.size(windows))) / total if total > 0 else 0.0
    factor = math.exp(1.96 * math.hypot(spread, MODEL_ERROR))
    kl, low, high = (float(f"{one:.4g}") for one in (total, total / factor, total * factor))
    return Prediction(kl=kl, low=low, high=high, entropy=float(f"{fisher.entropy:.4g}"))
