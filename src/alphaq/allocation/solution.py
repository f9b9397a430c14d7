"""What a solver returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Solution:
    """What a solver returns: one column per unit, and a certificate.

    objective - lower_bound is the proven optimality gap, in units of loss. price: Lagrange multiplier, the loss per
    unit of cost at which the plan's last upgrades were bought; 0 if the budget does not bind.
    """

    columns: np.ndarray
    objective: float
    lower_bound: float
    cost: int
    price: float = 0.0
