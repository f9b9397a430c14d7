"""Allocators to compare with: one width for all, and widths handed out by an order instead of a loss.

An order needs no scale, only who deserves more. On a ladder of choices from narrow to wide, all units get
the widest rung k that fits for all, and the rest of the budget lifts them one rung each, the most deserving
first:

    Σᵢ cost[i, k] ≤ budget < Σᵢ cost[i, k + 1],   slack < cost of the cheapest lift left.

So two plans differ in the order alone, and spend the same to less than one unit's step: what one gains over
the other is the order's merit (`random` and `first-layers` are the orders that any score has to beat).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphaq.errors import BudgetError

# Multiples of the golden ratio nearly repeat after 8, 48 or 144 (Fibonacci), periods that experts × projections have.
# Those of √3 do after 15, 41 or 56: powers of two and their triples stay evenly spread.
SPREAD_STEP = 3**0.5


def solve_uniform_mix(order: np.ndarray | None, ladder: Sequence[int], costs: np.ndarray, budget: int) -> np.ndarray:
    """Columns [units] (int64): the widest rung for all, and lifts in `order` for what remains of the budget.

    order: int [units], a permutation, the most deserving unit first; None lifts units evenly spread over the table.
    ladder: columns of costs [units, choices] (int64) from narrow to wide; every unit may store each. A unit whose
    lift does not fit is passed over, as a smaller one's may. Raises BudgetError if the narrowest rung does not fit
    or the ladder gets cheaper on the way, ValueError if `order` is no permutation.
    """
    rungs, base = _base(ladder, costs, budget)
    if order is None:
        order = _spread(len(costs))
    elif not np.array_equal(np.sort(order), np.arange(len(costs))):
        raise ValueError(f"The order is not a permutation of the {len(costs)} units. Rank scores with argsort first.")
    return np.asarray(ladder)[_lift(np.full(len(costs), base), order, rungs, budget)]


def solve_ratio(
    scores: np.ndarray, ladder: Sequence[int], costs: np.ndarray, budget: int, share: float = 0.25
) -> np.ndarray:
    """Columns [units] (int64) by a fixed ratio: the low scores one rung up, the high ones one rung down.

    Around the widest rung that fits for all, the `share` of units with the lowest scores [units] (float64; such as
    α, where low is sensitive) goes up and as many with the highest go down. Ups that exceed the budget are undone,
    highest score first; what is left lifts units one rung each, lowest score first. A base without a rung below has
    no downs, one without a rung above no ups. Equal scores go by index. ladder and costs [units, choices] (int64) are
    as in `solve_uniform_mix`. Raises BudgetError as it does, and for a score that is no number; ValueError for a
    share outside 0 to 0.5.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"A share of {share:g} is not between 0 and 0.5: units would go both up and down.")
    if not np.isfinite(scores).all():
        raise BudgetError("A score is NaN or infinite, so units cannot be ranked. Check the stats for bad values.")
    rungs, base = _base(ladder, costs, budget)
    order = np.argsort(scores, kind="stable")
    count = int(share * len(order))
    chosen = np.full(len(order), base)
    if base > 0:
        chosen[order[len(order) - count :]] -= 1
    if base + 1 < rungs.shape[1]:
        raised = order[:count]
        spent = int(rungs[np.arange(len(chosen)), chosen].sum())
        fits = spent + np.cumsum(rungs[raised, base + 1] - rungs[raised, base]) <= budget
        chosen[raised[fits]] += 1
    return np.asarray(ladder)[_lift(chosen, order, rungs, budget)]


def _base(ladder: Sequence[int], costs: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
    """Costs of the ladder [units, rungs], and its widest rung that fits for all units."""
    if not len(ladder):
        raise BudgetError("The ladder is empty. Name at least one choice that every unit may store.")
    rungs = costs[:, list(ladder)]
    falls = np.argwhere(np.diff(rungs, axis=1) < 0)
    if len(falls):
        unit, rung = falls[0]
        raise BudgetError(
            f"The ladder gets cheaper from column {ladder[rung]} to {ladder[rung + 1]} for unit {unit}. "
            "Name its choices from narrow to wide."
        )
    totals = rungs.sum(axis=0)
    if totals[0] > budget:
        raise BudgetError(f"The budget of {budget} is below {totals[0]}, the cost of the ladder's narrowest choice.")
    return rungs, int(np.flatnonzero(totals <= budget)[-1])


def _lift(chosen: np.ndarray, order: np.ndarray, rungs: np.ndarray, budget: int) -> np.ndarray:
    """Lift units by one rung each in `order`, where it fits; again until no lift fits."""
    chosen = chosen.copy()
    left = budget - int(rungs[np.arange(len(chosen)), chosen].sum())
    top = rungs.shape[1] - 1
    steps = np.diff(rungs, axis=1)
    lifted = True
    while lifted:
        lifted = False
        for unit in order:
            if chosen[unit] < top and steps[unit, chosen[unit]] <= left:
                left -= int(steps[unit, chosen[unit]])
                chosen[unit] += 1
                lifted = True
    return chosen


def _spread(units: int) -> np.ndarray:
    """An order whose every beginning is spread evenly over 0 … units − 1: by the fractional part of i·√3.

    It has no period, so neither layers nor the experts and projections interleaved in them are favoured.
    """
    return np.argsort(np.arange(units) * SPREAD_STEP % 1.0, kind="stable")
