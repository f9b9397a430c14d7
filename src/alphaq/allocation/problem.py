"""From a cost table and a budget in any of its three units to a solved problem."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from alphaq.allocation.baselines import solve_uniform
from alphaq.allocation.exact import solve_exact
from alphaq.config import Budget
from alphaq.errors import BudgetError
from alphaq.records import GROUP_SIZES, Choice, CostTable, Solution
from alphaq.registry import lookup

Solver = Callable[[np.ndarray, np.ndarray, int], Solution]
SOLVERS: dict[str, Solver] = {"alphaq": solve_exact, "uniform": solve_uniform}


def budget_costs(
    budget: Budget,
    choices: tuple[Choice, ...],
    weights: np.ndarray,
    block_bytes: np.ndarray | None,
    file_bytes: np.ndarray | None,
    fixed_bytes: int,
) -> tuple[np.ndarray, int]:
    """Costs int64 [units, choices] and limit in the budget's unit: code bits, stored bits or file bytes.

    weights: parameters of each unit. block_bytes: stored bytes of each unit at each choice without file
    headers; file_bytes: with them; both None where shapes are unknown. fixed_bytes: what the weight
    files take whatever is chosen. Raises BudgetError with the smallest feasible value.
    """
    parameters = int(weights.sum())
    if budget.bits is not None:
        costs = weights[:, None] * np.array([choice.bits for choice in choices], dtype=np.int64)
        limit = math.floor(budget.bits * parameters + 1e-9)
        least = f"--bits {_round_up(costs.min(axis=1).sum() / parameters)}"
    elif block_bytes is None or file_bytes is None:
        raise BudgetError("Stats alone know no bytes. State the budget as --bits, or give MODEL.")
    elif budget.bpw is not None:
        costs, limit = 8 * block_bytes, math.floor(budget.bpw * parameters + 1e-9)
        least = f"--bpw {_round_up(costs.min(axis=1).sum() / parameters)}"
    else:
        assert budget.size_bytes is not None
        costs, limit = file_bytes, budget.size_bytes - fixed_bytes
        least = f"--size {int(costs.min(axis=1).sum()) + fixed_bytes}"
    if int(costs.min(axis=1).sum()) > limit:
        narrowest = choices[int(costs.sum(axis=0).argmin())]
        raise BudgetError(
            f"A budget of {budget} is below the least these choices can reach, {least} with every expert at "
            f"{narrowest}. {_remedy(narrowest, budget)}"
        )
    return costs, limit


def _remedy(narrowest: Choice, budget: Budget) -> str:
    ways = ["Raise it"]
    if narrowest.bits > 1:
        ways.append("allow narrower --choices")
    if budget.bits is None and narrowest.group_size in GROUP_SIZES[:-1]:
        ways.append("use a larger --group-size")
    return ", or ".join(ways) + "."


def _round_up(bits: float) -> str:
    return f"{math.ceil(bits * 1e4 - 1e-6) / 1e4:g}"


def solve(table: CostTable, costs: np.ndarray, limit: int, method: str) -> Solution:
    """Choose for every unit by a method of `SOLVERS`. Raises BudgetError naming a loss that is no number."""
    bad = np.flatnonzero(~np.isfinite(table.losses).all(axis=1))
    if len(bad):
        raise BudgetError(
            f"The loss of {table.names[bad[0]]!r} is NaN or infinite. Check its alpha and variance, or lower --gamma."
        )
    return lookup("method", SOLVERS, method)(table.losses, costs, limit)
