"""Exact multiple-choice knapsack: min Σ loss[i, xᵢ] subject to Σ cost[i, xᵢ] ≤ budget.

For a price λ per unit of cost every unit may choose alone: xᵢ = argminⱼ loss + λ·cost. The dual value
L(λ) = Σᵢ minⱼ(loss + λ·cost) − λ·budget never exceeds the optimum, and its best λ leaves a gap of at
most one unit's step. That gap is then closed exactly. Writing r[i, j] ≥ 0 for how much choice j of
unit i is worse than that unit's best at price λ, any plan has

    loss = L(λ) + Σᵢ r[i, xᵢ] + λ·(budget − cost),

so a plan within `gap` of L(λ) uses only choices with r < gap: almost every unit is settled, and a
dynamic program over the Pareto front (cost, Σ r) of the few open ones finds the optimum. The gap
searched is widened until a plan is found in it, so the front stays small (core idea: Pisinger, 1995).

Where losses are nearly proportional to costs and the costs share no step (a subset-sum problem), r is
about 0 everywhere and the front has no bound. Then the plan is improved over a few units at a time,
which shrinks the gap to search, and if even that is too wide the plan is returned with the bound proven.
"""

from __future__ import annotations

import numpy as np

from alphaq.allocation.solution import Solution
from alphaq.errors import BudgetError
from alphaq.simd.vectors import kernel

RELATIVE_TOLERANCE = 1e-12  # a gap below this is rounding, not loss
BISECTIONS = 200
FRONT_LIMIT = 2_000_000  # candidate states of one unit; tables of real models need a few thousand
POLISH_LIMIT = 200_000
POLISH_PAIRS = 20
POLISH_ROUNDS = 4


class _FrontTooLarge(Exception):
    """The dynamic program would need more than its limit of states."""


def solve_exact(losses: np.ndarray, costs: np.ndarray, budget: int) -> Solution:
    """Optimal columns for losses [units, choices] (float64) and costs [units, choices] (int64).

    The objective is proven to equal `lower_bound` but for rounding, except where the losses are nearly proportional
    to uneven costs: there a gap (objective − lower_bound) may stay, usually of one cost step. Ties go to the cheaper
    plan, then to the lower column. Raises BudgetError if even the cheapest choices exceed the budget, or if the
    losses are not finite.
    """
    steps, unit, room = _common_steps(losses, costs, budget)
    units = np.arange(len(losses))
    price, columns = _best_price(losses, steps, room)
    columns = _fill(losses, steps, columns, room)
    reduced = losses + price * steps
    best = reduced.min(axis=1)
    reduced = reduced - best[:, None]
    settled = reduced.argmin(axis=1)
    relaxed = float(best.sum() - price * room)
    upper = float(losses[units, columns].sum())
    # Not of the largest loss: one forbidding loss of 1e12 must not make the others' differences rounding.
    tolerance = RELATIVE_TOLERANCE * abs(upper)
    proven = 0.0  # no plan is within this of `relaxed`
    width = (upper - relaxed) / 64
    while (gap := upper - relaxed) > max(tolerance, proven):
        width = min(width, gap)
        core = np.flatnonzero((reduced <= width).sum(axis=1) > 1)
        try:
            better = _search_core(steps, reduced, price, room, width * (1 + 1e-9), core, settled)
        except _FrontTooLarge:
            columns = _polish(steps, reduced, price, room, gap, columns)
            upper = float(losses[units, columns].sum())
            if upper - relaxed < width:
                continue
            break
        if better is not None:
            if losses[units, better].sum() < upper:
                columns = better
                upper = float(losses[units, columns].sum())
            proven = upper - relaxed
            break
        proven = width
        width *= 4
    bound = upper if proven >= upper - relaxed else relaxed + proven
    return Solution(columns, upper, min(bound, upper), int(costs[units, columns].sum()), price / unit)


def relaxation_price(losses: np.ndarray, costs: np.ndarray, budget: int) -> float:
    """The price λ ≥ 0, in loss per unit of cost, at which the units' own choices just fit the budget.

    losses [units, choices] float64, costs [units, choices] int64. 0 if the budget does not bind. Raises BudgetError
    as `solve_exact` does.
    """
    steps, unit, room = _common_steps(losses, costs, budget)
    return _best_price(losses, steps, room)[0] / unit


def _common_steps(losses: np.ndarray, costs: np.ndarray, budget: int) -> tuple[np.ndarray, int, int]:
    """Costs above each unit's cheapest, in the largest common step; that step; and the budget left, in steps.

    Only differences matter to the solver. Raises BudgetError for losses that are not finite or too small a budget.
    """
    if not np.isfinite(losses).all():
        raise BudgetError("A loss is NaN or infinite, so no plan can be optimal. Check the stats for bad values.")
    floor = costs.min(axis=1)
    if int(floor.sum()) > budget:
        raise BudgetError(f"The budget of {budget} is below {int(floor.sum())}, the cost of the cheapest choices.")
    steps = costs - floor[:, None]
    unit = int(np.gcd.reduce(steps, axis=None)) or 1
    steps //= unit
    return steps, unit, (budget - int(floor.sum())) // unit


@kernel
def _choose(losses, steps, price, columns):  # type: ignore[no-untyped-def]
    """Each unit's own best column at a price, the cheapest among equals, into `columns`; returns the total cost."""
    total = 0
    for unit in range(len(losses)):
        best = losses[unit, 0] + price * steps[unit, 0]
        chosen = 0
        for column in range(1, losses.shape[1]):
            value = losses[unit, column] + price * steps[unit, column]
            if value < best or (value == best and steps[unit, column] < steps[unit, chosen]):
                best, chosen = value, column
        columns[unit] = chosen
        total += steps[unit, chosen]
    return total


def _best_price(losses: np.ndarray, steps: np.ndarray, room: int) -> tuple[float, np.ndarray]:
    """Smallest price at which the units' own choices fit, by bisection; and those choices."""
    columns, candidate = np.empty((2, len(losses)), np.int64)
    if _choose(losses, steps, 0.0, columns) <= room:
        return 0.0, columns
    low, high = 0.0, max(float(np.ptp(losses)), 1e-300)
    while _choose(losses, steps, high, columns) > room:
        low, high = high, high * 4
    for _ in range(BISECTIONS):
        middle = low**0.5 * high**0.5 if low > 0 else high / 1024
        if not low < middle < high:
            break
        cost = _choose(losses, steps, middle, candidate)
        if cost <= room:
            high, columns, candidate = middle, candidate, columns
        else:
            low = middle
        if high - low <= 4e-16 * high or cost == room:
            break
    return high, columns


def _fill(losses: np.ndarray, steps: np.ndarray, columns: np.ndarray, room: int) -> np.ndarray:
    """Spend what is left greedily, best loss per cost first: a good plan to start from, not yet the best."""
    columns = columns.copy()
    left = room - int(np.take_along_axis(steps, columns[:, None], 1).sum())
    target, rate = np.empty(len(steps), np.int64), np.empty(len(steps))
    for _ in range(steps.shape[1]):
        _upgrades(losses, steps, columns, left, target, rate)
        order = np.flatnonzero(rate > 0)
        if not len(order):
            break
        order = order[np.argsort(-rate[order], kind="stable")]
        needed = steps[order, target[order]] - steps[order, columns[order]]
        prefix = np.cumsum(needed) <= left
        taken = len(order) if prefix.all() else max(1, int(prefix.argmin()))
        columns[order[:taken]] = target[order[:taken]]
        left -= int(needed[:taken].sum())
    return columns


@kernel
def _upgrades(losses, steps, columns, left, target, rate):  # type: ignore[no-untyped-def]
    """The column of most loss saved per cost that still fits, and that rate, for each unit; 0 where there is none."""
    for unit in range(len(losses)):
        rate[unit] = 0.0
        now = columns[unit]
        for column in range(losses.shape[1]):
            gain = losses[unit, now] - losses[unit, column]
            extra = steps[unit, column] - steps[unit, now]
            if gain > 0 and extra <= left and gain / max(float(extra), 0.5) > rate[unit]:
                target[unit], rate[unit] = column, gain / max(float(extra), 0.5)


def _polish(
    steps: np.ndarray, reduced: np.ndarray, price: float, room: int, width: float, columns: np.ndarray
) -> np.ndarray:
    """A plan at least as good, by re-choosing a few units at a time: those that move at the least added excess."""
    now, excess = (np.take_along_axis(table, columns[:, None], 1) for table in (steps, reduced))
    dearer, cheaper = (np.where(move, reduced - excess, np.inf).min(axis=1) for move in (steps > now, steps < now))
    # As many that can take more as can give up some: either alone only fills the slack, and that is done.
    pairs = np.stack([np.argsort(dearer, kind="stable"), np.argsort(cheaper, kind="stable")], axis=1)
    for start in range(0, min(len(pairs), POLISH_ROUNDS * POLISH_PAIRS), POLISH_PAIRS):
        core = np.unique(pairs[start : start + POLISH_PAIRS])
        better = _search_core(steps, reduced, price, room, width * (1 + 1e-9), core, columns, thin=True)
        columns = columns if better is None else better
    return columns


def _search_core(
    steps: np.ndarray,
    reduced: np.ndarray,
    price: float,
    room: int,
    width: float,
    core: np.ndarray,
    settled: np.ndarray,
    thin: bool = False,
) -> np.ndarray | None:
    """Best plan within `width` of the bound that differs from `settled` only in the units `core`; None without one.

    A front too large raises _FrontTooLarge, or with `thin` loses states evenly: what is found then is only a good plan.
    """
    open_choices = reduced <= width
    open_choices[core, settled[core]] = True
    fixed = np.setdiff1d(np.arange(len(steps)), core, assume_unique=True)
    # States: cost so far and excess Σ r so far. Suffix ranges of cost discard states that can no
    # longer fit, or that would leave more slack than `width` pays for.
    rest_low = _of_the_rest(np.where(open_choices[core], steps[core], np.iinfo(np.int64).max).min(axis=1))
    rest_high = _of_the_rest(np.where(open_choices[core], steps[core], -1).max(axis=1))
    cost = np.array([int(steps[fixed, settled[fixed]].sum())])
    excess = np.array([reduced[fixed, settled[fixed]].sum()])
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for position, unit in enumerate(core):
        options = np.flatnonzero(open_choices[unit])
        limit = POLISH_LIMIT if thin else FRONT_LIMIT
        if len(cost) * len(options) > limit:
            if not thin:
                raise _FrontTooLarge
            kept = np.linspace(0, len(cost) - 1, limit // len(options)).astype(np.int64)
            cost, excess = cost[kept], excess[kept]
            history[-1] = history[-1][0][kept], history[-1][1][kept]
        new_cost = (cost[:, None] + steps[unit, options]).ravel()
        new_excess = (excess[:, None] + reduced[unit, options]).ravel()
        parent = np.repeat(np.arange(len(cost)), len(options))
        option = np.tile(options, len(cost))
        least_slack = np.maximum(room - new_cost - rest_high[position], 0)
        keep = (new_cost + rest_low[position] <= room) & (new_excess + price * least_slack <= width)
        new_cost, new_excess, parent, option = (part[keep] for part in (new_cost, new_excess, parent, option))
        front = _pareto(new_cost, new_excess - price * new_cost)
        cost, excess = new_cost[front], new_excess[front]
        history.append((parent[front], option[front]))
        if not len(cost):
            return None
    total = excess + price * (room - cost)
    state = int(np.argmin(np.where(cost <= room, total, np.inf)))
    if not (cost[state] <= room and total[state] <= width):
        return None
    columns = settled.copy()
    for unit, (parent, option) in zip(core[::-1], history[::-1], strict=True):
        columns[unit] = option[state]
        state = int(parent[state])
    return columns


def _of_the_rest(costs: np.ndarray) -> np.ndarray:
    """Sums of what comes after each, int64 [n] of [n]."""
    return np.append(np.cumsum(costs[::-1])[::-1][1:], 0) if len(costs) else np.zeros(0, np.int64)


def _pareto(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """States on the front of (cost, loss), cheapest first: dearer ones survive only with strictly less loss."""
    order = np.lexsort((loss, cost))
    running = np.minimum.accumulate(loss[order])
    return order[np.append(True, running[1:] < running[:-1])] if len(order) else order
