"""Every plan that some price makes best, in the order of growing size: what a budget slider moves along.

At price μ per unit of cost every unit takes the choice of least loss + μ·cost, a vertex of the lower convex hull of its
(cost, loss) points. As μ falls from infinity to 0 the units climb their hulls one edge at a time, always the edge that
saves the most loss per cost. All edges sorted by that rate are the path: its first k of them are the best plan of their
own cost (Everett, 1963). A budget between two points has a better plan than the point below it by less than one edge's
saving; `alphaq plan` finds it, and so is never above the path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from alphaq.nouns.plan import PlanTable


@dataclass(frozen=True)
class BudgetPath:
    """Where each unit starts, and the steps from the cheapest plan to the best one.

    start: int [units], columns of the cheapest plan. start_losses: float64 [units]. start_cost: in the table's unit of
    cost. units, columns: int [steps], which unit steps up, and to which column. saved: float64 [steps], loss saved by
    each. added: int64 [steps], cost added by each. saved / added never rises along the path.
    """

    start: np.ndarray
    start_losses: np.ndarray
    start_cost: int
    units: np.ndarray
    columns: np.ndarray
    saved: np.ndarray
    added: np.ndarray

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def costs(self) -> np.ndarray:
        """int64 [steps + 1]: cost after each number of steps, ascending."""
        return self.start_cost + np.append(0, np.cumsum(self.added))

    @cached_property
    def losses(self) -> np.ndarray:
        """float64 [steps + 1]: loss after each number of steps, descending.

        Summed from the far end, where losses are ten thousand times smaller than at the start.
        """
        ahead = np.cumsum(self.saved[::-1])[::-1]
        return self.final_loss + np.append(ahead, 0.0)

    @cached_property
    def final_loss(self) -> float:
        """Loss of the last plan: every unit at its best choice."""
        last = self.start_losses.copy()
        np.subtract.at(last, self.units, self.saved)
        return float(last.sum())

    def steps_within(self, budget: float) -> int:
        """How many steps fit into a budget; 0 also where not even the start does."""
        return max(0, int(np.searchsorted(self.costs, budget, side="right")) - 1)

    def columns_after(self, steps: int) -> np.ndarray:
        """int [units]: the choice of each unit after so many steps."""
        now = self.start.copy()
        now[self.units[:steps]] = self.columns[:steps]  # of a unit's several steps the last one counts
        return now


def tables_of(table: PlanTable) -> tuple[np.ndarray, np.ndarray]:
    """Losses float64 [units, choices], infinite where a choice is forbidden, and costs int64 [units, choices]."""
    shape = len(table.losses), len(table.choices)
    losses = np.array(
        [[np.inf if loss is None else loss for loss in row] for row in table.losses.values()], np.float64
    ).reshape(shape)
    return losses, np.array(table.costs, np.int64).reshape(-1, shape[1])[list(table.cost_of)]


def budget_path(losses: np.ndarray, costs: np.ndarray) -> BudgetPath:
    """The path for losses float64 [units, choices] (infinite: forbidden) and costs int64 [units, choices].

    Of equal rates a unit takes the nearer choice, and of equal steps the unit named first goes first. Every
    unit needs a choice with a finite loss.
    """
    rows = np.arange(len(losses))
    cheapest = np.where(np.isfinite(losses), costs, np.iinfo(np.int64).max)
    now = np.where(cheapest == cheapest.min(axis=1, keepdims=True), losses, np.inf).argmin(axis=1)
    start, start_costs = now, costs[rows, now]
    steps: list[tuple[np.ndarray, ...]] = []
    last_rate = np.full(len(losses), np.inf)
    climbing = rows
    while len(climbing):
        loss, cost = losses[climbing, now][:, None], costs[climbing, now][:, None]
        saved, added = loss - losses[climbing], costs[climbing] - cost
        better = (saved > 0) & (added > 0)
        rates = np.divide(saved, added, out=np.zeros_like(saved), where=better)
        best = rates.max(axis=1)
        nearest = np.where(better & (rates == best[:, None]), added, np.iinfo(np.int64).max).argmin(axis=1)
        moves = np.flatnonzero(best > 0)
        climbing, now = climbing[moves], nearest[moves]
        # Rounding may make an edge look steeper than the one before it; the order of a unit's edges must hold.
        rate = last_rate[climbing] = np.minimum(best[moves], last_rate[climbing])
        steps.append((rate, climbing, now, saved[moves, now], added[moves, now]))
    rate, units, columns, saved, added = (np.concatenate(part) for part in zip(*steps, strict=True))
    order = np.argsort(-rate, kind="stable")
    return BudgetPath(
        start,
        losses[rows, start],
        int(start_costs.sum()),
        units[order],
        columns[order],
        saved[order],
        added[order],
    )
