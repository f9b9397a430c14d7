"""Losses in nats: ½ · E[G²] · (w − ŵ)², summed over a matrix as its Fisher information says (calibration/fisher.py).

An estimate of the KL divergence per token that rounding the matrix adds, without a constant. What a plan is foretold to
have is their sum and what tokens that change their expert add to it (calibration/swaps.py). Where a model's pass has
no gradient here, the default goes by the signal instead (signal.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from alphaq.calibration.fisher import Fisher
from alphaq.nouns.matrix import MatrixRef, Role
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


def prediction(
    fisher: Fisher, losses: Mapping[str, float], matrices: Sequence[MatrixRef], dropped: Mapping[int, float] = {}
) -> Prediction:
    """What matrices' losses, in nats per token by name, come to. matrices: all of the model. dropped: what experts that
    are gone cost, by layer."""
    total = sum(losses.values()) + sum(dropped.values())
    windows = sum(loss * one.windows for name, loss in losses.items() if (one := fisher.matrices.get(name)) is not None)
    spread = float(np.std(windows, ddof=1) / math.sqrt(np.size(windows))) / total if total > 0 else 0.0
    factor = math.exp(1.96 * math.hypot(spread, MODEL_ERROR))
    whole = total + swapped(fisher, losses, matrices, dropped)
    kl, low, high = (float(f"{one:.4g}") for one in (whole, whole / factor, whole * factor))
    return Prediction(kl=kl, low=low, high=high, entropy=float(f"{fisher.entropy:.4g}"))


def swapped(
    fisher: Fisher, losses: Mapping[str, float], matrices: Sequence[MatrixRef], dropped: Mapping[int, float] = {}
) -> float:
    """Nats per token by tokens that change their expert: Σ κ·√Q over the routers, Q of what comes before each."""
    before, within = defaultdict[int, float](float), defaultdict[int, float](float, dropped)
    for matrix in matrices:
        if matrix.role is Role.EMBEDDING:
            within[-1] += losses.get(matrix.name, 0.0)
        elif matrix.layer is not None:
            early = matrix.role in (Role.ATTENTION, Role.MIXER)
            (before if early else within)[matrix.layer] += losses.get(matrix.name, 0.0)
    total, reached = 0.0, within[-1]
    for layer in range(max(fisher.swaps, default=-1) + 1):
        reached += before[layer]
        total += fisher.swaps.get(layer, 0.0) * math.sqrt(reached)
        reached += within[layer]
    return total
