"""From a cost table and a budget in any of its three units to a solved problem."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from alphaq.allocation.baselines import solve_uniform
from alphaq.allocation.exact import solve_exact
from alphaq.config import Budget
from alphaq.errors import BudgetError
from alphaq.records import CostTable, Solution
from alphaq.registry import lookup

Solver = Callable[[np.ndarray, np.ndarray, int], Solution]
SOLVERS: dict[str, Solver] = {"alphaq": solve_exact, "uniform": solve_uniform}


def solve(table: CostTable, budget: Budget, method: str, block_bytes: np.ndarray | None, fixed_bytes: int) -> Solution:
    """Choose for every unit.

    block_bytes: stored bytes of each unit at each choice without file headers, for a `bpw` budget.
    fixed_bytes: what the weight files take whatever is chosen, for a `size` budget. Costs in the
    solution are code bits, stored bits or file bytes by the budget's unit. Raises BudgetError with
    the smallest feasible value.
    """
    solver = lookup("method", SOLVERS, method)
    parameters = int(table.weights.sum())
    if budget.bits is not None:
        costs, limit = table.code_bits, math.floor(budget.bits * parameters + 1e-9)
        least = f"--bits {costs.min(axis=1).sum() / parameters:.4g}"
    elif table.bytes is None or block_bytes is None:
        raise BudgetError(
            "Stats without `rows` and `columns` know no bytes. State the budget as --bits, or give MODEL."
        )
    elif budget.bpw is not None:
        costs, limit = 8 * block_bytes, math.floor(budget.bpw * parameters + 1e-9)
        least = f"--bpw {math.ceil(costs.min(axis=1).sum() / parameters * 1e4) / 1e4:g}"
    else:
        assert budget.size_bytes is not None
        costs, limit = table.bytes, budget.size_bytes - fixed_bytes
        least = f"--size {int(costs.min(axis=1).sum()) + fixed_bytes}"
    cheapest = int(costs.min(axis=1).sum())
    if cheapest > limit:
        narrowest = table.choices[int(costs.sum(axis=0).argmin())]
        raise BudgetError(
            f"A budget of {budget} is below the least these choices can reach, {least} with every expert at "
            f"{narrowest}. Raise it, or allow narrower --choices or a larger --group-size."
        )
    return solver(table.losses, costs, limit)
