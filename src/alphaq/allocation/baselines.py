"""Allocators to compare with."""

from __future__ import annotations

import numpy as np

from alphaq.errors import BudgetError
from alphaq.records import Solution


def solve_uniform(losses: np.ndarray, costs: np.ndarray, budget: int) -> Solution:
    """One choice for every unit: the one of least total loss that fits. Its bound is only itself.

    Raises BudgetError if no single choice fits.
    """
    totals = costs.sum(axis=0)
    fitting = np.flatnonzero(totals <= budget)
    if not len(fitting):
        raise BudgetError(f"The budget of {budget} is below {int(totals.min())}, the cost of the cheapest choice.")
    column = int(fitting[losses.sum(axis=0)[fitting].argmin()])
    objective = float(losses[:, column].sum())
    return Solution(np.full(len(losses), column), objective, objective, int(totals[column]))
