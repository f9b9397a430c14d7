"""Sums that do not depend on how many threads torch has: the same checkpoint must give the same plan."""

from __future__ import annotations

import math

import torch

VALUES_AT_ONCE = 32768  # the size up to which torch reduces in one thread, in one fixed order


def squared_norm(values: torch.Tensor) -> float:
    """Σ v² of a tensor of any shape, in float64."""
    return math.fsum(float(part.double().square_().sum()) for part in values.reshape(-1).split(VALUES_AT_ONCE))


def total(values: torch.Tensor) -> float:
    """Σ v of a tensor of any shape, in float64."""
    return math.fsum(float(part.double().sum()) for part in values.reshape(-1).split(VALUES_AT_ONCE))
