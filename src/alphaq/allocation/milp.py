"""The multiple-choice knapsack with side constraints, by HiGHS' branch and bound.

With one binary y[i, j] per unit and choice,

    min Σ loss[i, j]·y[i, j]   s.t.   Σⱼ y[i, j] = 1,   Σ cost[i, j]·y[i, j] ≤ budget,
                                      lowerₖ ≤ Σ coefficientₖ[i, j]·y[i, j] ≤ upperₖ.

`solve_exact` is far faster but knows one constraint only; here come rules such as "at least one expert of
each block at 3 bits" or "each device's share fits its memory". HiGHS works with absolute tolerances of
about 1e-6, so it is given losses and rows of moderate size, and its answer is only believed after budget,
constraints and objective are computed anew from the chosen columns.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphaq.allocation.exact import relaxation_price
from alphaq.allocation.solution import Solution
from alphaq.errors import BudgetError

OBJECTIVE_SCALE = 1e6  # the objective HiGHS sees: its absolute gap of 1e-6 is then 1e-12 of it
LARGEST_LOSS = 1e10  # beyond, HiGHS' arithmetic suffers more than its tolerance gains
LARGEST_COEFFICIENT = 1e6  # of a row, so that the row's tolerance of 1e-6 is below one step of its costs
ROUNDING = 1e-9  # how far a constraint of fractional coefficients may be missed, relative to its terms


class InfeasibleError(BudgetError):
    """No plan meets all that is asked for."""


@dataclass(frozen=True)
class SideConstraint:
    """lower ≤ Σ coefficients[row, xᵢ] ≤ upper over the chosen columns x of the units i = units[row].

    label: what errors call it. units: int [rows], indices of the units that take part. coefficients: float64
    [rows, choices]. lower, upper: in the coefficients' unit; ±inf for a side without limit.
    """

    label: str
    units: np.ndarray
    coefficients: np.ndarray
    lower: float
    upper: float

    def holds(self, columns: np.ndarray) -> bool:
        """Whether the plan `columns` [units] meets it: exactly for whole coefficients, else but for rounding."""
        terms = self.coefficients[np.arange(len(self.units)), columns[self.units]]
        total = math.fsum(terms)  # exact for whole numbers
        whole = (terms == np.floor(terms)).all()
        slack = 0.0 if whole else ROUNDING * float(np.abs(terms).sum())
        return self.lower - slack <= total <= self.upper + slack


def solve_milp(
    losses: np.ndarray,
    costs: np.ndarray,
    budget: int,
    constraints: Sequence[SideConstraint] = (),
    time_limit_s: float = 300.0,
) -> Solution:
    """Optimal columns for losses [units, choices] (float64), costs [units, choices] (int64) and side constraints.

    `lower_bound` is HiGHS' own; after `time_limit_s` seconds the best plan so far comes back with the bound so far.
    `price` is that of the relaxation without side constraints. Raises InfeasibleError if no plan fits (naming the
    constraint that alone cannot be met within the budget, if there is one), BudgetError if a constraint is malformed,
    if a loss is not finite, or if the time ran out before any plan was found.
    """
    price = relaxation_price(losses, costs, budget)
    for constraint in constraints:
        _check(constraint, losses.shape)
    deadline = time.monotonic() + time_limit_s
    units = np.arange(len(losses))
    least = losses.min(axis=1)
    relaxed = losses[units, (losses + price * costs).argmin(axis=1)].sum()
    scale = _loss_scale(float((losses - least[:, None]).max(initial=0.0)), abs(float(relaxed)))
    answer = _highs((losses - least[:, None]) * scale, costs, budget, constraints, time_limit_s)
    if answer.status == 2:
        raise InfeasibleError(_blame(costs, budget, constraints, deadline))
    if answer.x is None:
        if answer.status == 1:
            raise BudgetError(f"No plan was found within {time_limit_s:g} s. Allow more time, or relax a constraint.")
        raise BudgetError(f"HiGHS gave no plan: {answer.message}")
    columns = answer.x.reshape(losses.shape).argmax(axis=1)
    cost = int(costs[units, columns].sum())
    broken = [constraint.label for constraint in constraints if not constraint.holds(columns)]
    if cost > budget or broken:
        what = ", ".join(([f"the budget of {budget} by {cost - budget}"] if cost > budget else []) + broken)
        raise BudgetError(
            f"HiGHS' plan misses, by rounding, {what}. Move the limit by one step, or measure it in a larger unit."
        )
    objective = float(losses[units, columns].sum())
    # HiGHS has no bound, or −∞, if it was stopped early; the shifted losses are never below 0.
    bound = float(least.sum()) + max(answer.mip_dual_bound or 0.0, 0.0) / scale
    return Solution(columns, objective, min(bound, objective), cost, price)


@contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """HiGHS prints some warnings from C, past `sys.stdout`; they go to stderr, since stdout may be somebody's JSON."""
    try:
        kept = os.dup(1)
    except OSError:  # stdout is closed: nothing to keep clean
        yield
        return
    if sys.stdout is not None:
        sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # C keeps lines back when it does not write to a terminal
        os.dup2(kept, 1)
        os.close(kept)


def _check(constraint: SideConstraint, shape: tuple[int, ...]) -> None:
    """Raise BudgetError for a constraint that does not fit the table or holds values that cannot be used."""
    name = f"Constraint {constraint.label!r}"
    rows = (len(constraint.units), shape[1])
    if constraint.coefficients.shape != rows:
        raise BudgetError(f"{name} has coefficients {constraint.coefficients.shape}; its units and choices are {rows}.")
    if len(constraint.units) and not (constraint.units.min() >= 0 and constraint.units.max() < shape[0]):
        raise BudgetError(f"{name} names a unit outside 0 to {shape[0] - 1}.")
    if not np.isfinite(constraint.coefficients).all():
        raise BudgetError(f"{name} has a coefficient that is NaN or infinite.")
    if not constraint.lower <= constraint.upper:
        raise BudgetError(f"{name} asks for at least {constraint.lower:g} and at most {constraint.upper:g}.")


def _loss_scale(largest: float, optimum: float) -> float:
    """Factor that brings the optimum (about) to OBJECTIVE_SCALE, as far as the largest difference of losses allows."""
    if largest == 0:
        return 1.0
    return min(LARGEST_LOSS / largest, OBJECTIVE_SCALE / optimum if optimum else math.inf)


def _highs(
    losses: np.ndarray, costs: np.ndarray, budget: int, constraints: Sequence[SideConstraint], time_limit_s: float
) -> Any:
    """scipy's result for losses already scaled; variable i · choices + j says that unit i takes choice j."""
    # Here, not above: scipy.optimize takes longer to import than the rest of the package, and few runs need it.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron, vstack

    units, choices = losses.shape
    # Only what is above the cheapest plan counts, in whole steps: the same rows with the smallest numbers.
    floor = costs.min(axis=1)
    steps = costs - floor[:, None]
    step = int(np.gcd.reduce(steps, axis=None)) or 1
    rows = [kron(eye_array(units), np.ones((1, choices)))]
    lower, upper = [np.ones(units)], [np.ones(units)]

    def add(row: Any, least: float, most: float) -> None:
        # Whole numbers are kept while they are small; fractions are enlarged, lest they vanish in the tolerance.
        factor = LARGEST_COEFFICIENT / (float(np.abs(row.data).max(initial=0.0)) or 1.0)
        if (row.data == np.floor(row.data)).all():
            factor = min(factor, 1.0)
        rows.append(row * factor)
        lower.append(np.array([least * factor]))
        upper.append(np.array([most * factor]))

    add(csr_array((steps // step).reshape(1, -1).astype(float)), -math.inf, (budget - int(floor.sum())) // step)
    for constraint in constraints:
        places = (constraint.units[:, None] * choices + np.arange(choices)).ravel()
        values = constraint.coefficients.ravel().astype(float)
        row = csr_array((values, (np.zeros(len(places), int), places)), shape=(1, losses.size))
        add(row, constraint.lower, constraint.upper)
    with _stdout_kept_clean():
        return milp(
            losses.ravel(),
            constraints=LinearConstraint(vstack(rows, format="csr"), np.concatenate(lower), np.concatenate(upper)),
            integrality=np.ones(losses.size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": max(time_limit_s, 0.0)},
        )


def _blame(costs: np.ndarray, budget: int, constraints: Sequence[SideConstraint], deadline: float) -> str:
    """Which constraints cannot be met within the budget: those that fail alone, else all of them together."""
    nothing = np.zeros(costs.shape)
    alone = [
        constraint.label
        for constraint in constraints
        if _highs(nothing, costs, budget, [constraint], max(deadline - time.monotonic(), 1.0)).status == 2
    ]
    if alone:
        names = ", ".join(map(repr, alone))
        return f"No plan within the budget of {budget} meets {names}, even alone. Raise the budget, or relax it."
    names = ", ".join(repr(constraint.label) for constraint in constraints)
    return f"No plan within the budget of {budget} meets {names} together, though each alone can be met. Relax one."
