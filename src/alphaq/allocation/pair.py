"""Exact multiple-choice knapsack with two budgets: bytes that are stored, and nanoseconds that a token takes.

    min Σ loss[i, xᵢ]   s.t.   Σ cost[i, xᵢ] ≤ budget,   Σ time[i, xᵢ] ≤ time_limit.

For prices a, b of the two rooms every unit chooses alone, and the dual

    L(a, b) = Σᵢ minⱼ (loss + a·cost + b·time) − a − b

(both in shares of their room) never exceeds the optimum. It is concave and piecewise linear, with a plan for every
piece, so its maximum is found by cuts: a linear program in a, b and L of the pieces seen so far (Kelley, 1960). As with
one budget (exact.py), any plan is worse than L by what its choices are worse than their unit's best at these prices, so
a plan within `width` of L uses only choices that are within it. All plans of these are gone through, unit by unit, but
those that what is left of both rooms rules out; `width` grows until there is one. Where they are too many, as with a
few units of large steps, HiGHS looks for the best, among all units if they are few; of many a proven gap may stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from alphaq.allocation.exact import solve_exact
from alphaq.allocation.milp import InfeasibleError, SideConstraint, solve_milp
from alphaq.allocation.solution import Solution
from alphaq.errors import BudgetError

CUTS = 300
CONVERGED = 1e-12  # of the loss
FAR = 1e5  # times what the dual may still rise: planes and prices that need not be looked at
FIRST_OPEN = 16  # units that are open at first
WIDER = 1.25
STATES = 500_000  # that are gone through at most
HIGHS_UNITS = 400  # that HiGHS is given at most; it takes minutes for more
DENSE = 20_000  # states from which on equal ones are looked for
TIME_LIMIT_S = 60.0
NOTHING = 1e-290  # of losses, whose shares cannot be told apart
LEAST_RISE = 1e-18  # of what losses can differ by
ROUNDING = 1e-9  # of sums of losses
HIGHEST_RISE = 1e12  # of prices, to find a plan that fits
BISECTIONS, FILLED = 60, 400
EXCLUDED = "No plan keeps both budgets, though each can be kept alone."


class _TooManyError(Exception):
    """There are more plans than are gone through."""


class NoPairError(BudgetError):
    """Either budget can be kept, but not both."""


@dataclass(frozen=True)
class _Pair:
    """The problem. steps: int64 [2, units, choices], costs and times above each unit's least. rooms: what is left."""

    losses: np.ndarray
    steps: np.ndarray
    rooms: tuple[int, int]

    @property
    def shares(self) -> np.ndarray:
        """float64 [2, units, choices]: steps in shares of their room."""
        return self.steps / np.maximum(self.rooms, 1)[:, None, None]

    def fits(self, columns: np.ndarray) -> bool:
        """Whether a plan keeps both budgets."""
        return bool((self.steps[:, np.arange(len(columns)), columns].sum(axis=1) <= self.rooms).all())

    def loss(self, columns: np.ndarray) -> float:
        return float(self.losses[np.arange(len(columns)), columns].sum())

    def cheapest(self, prices: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss of the units' own choices at prices [2], and by how much they exceed both rooms, in shares."""
        shares = self.shares
        columns = (self.losses + prices[0] * shares[0] + prices[1] * shares[1]).argmin(axis=1)
        return self.loss(columns), shares[:, np.arange(len(columns)), columns].sum(axis=1) - 1.0

    @property
    def spread(self) -> tuple[float, float]:
        """The largest loss of a plan, and by how much losses can differ."""
        return float(self.losses.max(axis=1).sum()), float(np.ptp(self.losses, axis=1).sum())


@dataclass(frozen=True)
class _View:
    """The problem at the best prices [2]. reduced: float64 [units, choices], by how much a choice is worse than its
    unit's best. relaxed: the dual. widest: no plan is further from it."""

    pair: _Pair
    reduced: np.ndarray
    prices: np.ndarray
    relaxed: float
    widest: float

    def wider(self, width: float) -> float:
        """The next width to look within."""
        return min(max(width * WIDER, self.widest * 1e-12), self.widest)


def solve_pair(losses: np.ndarray, costs: np.ndarray, budget: int, times: np.ndarray, time_limit: int) -> Solution:
    """Optimal columns for losses [units, choices] (float64), costs and times [units, choices] (int64).

    `lower_bound` is proven, and equals the objective but for rounding unless HiGHS ran out of time. `price` is that of
    stored bytes. Raises BudgetError if either budget is below what its cheapest choices take, NoPairError if no plan
    keeps both.
    """
    alone = solve_exact(losses, costs, budget)
    units = np.arange(len(losses))
    if int(times[units, alone.columns].sum()) <= time_limit:
        return alone
    other = solve_exact(losses, times, time_limit)
    if (cost := int(costs[units, other.columns].sum())) <= budget:
        return replace(other, cost=cost, price=0.0)
    tables = np.stack([costs, times])
    floors = tables.min(axis=2, keepdims=True)
    rooms = int(budget - floors[0].sum()), int(time_limit - floors[1].sum())
    pair = _Pair(losses, tables - floors, rooms)
    prices, relaxed = best_prices(pair.cheapest, *pair.spread)
    columns, bound = _closed(pair, prices, relaxed)
    objective = pair.loss(columns)
    cost = int(costs[units, columns].sum())
    return Solution(columns, objective, min(bound, objective), cost, float(prices[0]) / max(rooms[0], 1))


def best_prices(
    cheapest: Callable[[np.ndarray], tuple[float, np.ndarray]], most: float, widest: float
) -> tuple[np.ndarray, float]:
    """Prices [2] of whole rooms that make the dual largest, and its value.

    cheapest: of the best plan at prices [2], its loss and by how much it exceeds both rooms, in shares of them. most:
    the largest loss of a plan; widest: by how much losses can differ. Raises NoPairError where the dual exceeds the
    loss of every plan, so that none keeps both budgets.
    """
    spread = widest  # the most that the dual may still rise
    if widest <= NOTHING:  # all plans lose as much
        return np.zeros(2), most
    losses, overs = np.empty(0), np.empty((0, 2))
    best, at, asked = -math.inf, np.zeros(2), np.zeros(2)
    for _ in range(CUTS):
        loss, over = cheapest(asked)
        losses, overs = np.append(losses, loss), np.vstack([overs, over])
        value = float(losses[-1] + asked @ overs[-1])
        if value > most + ROUNDING * (abs(most) + widest):
            raise NoPairError(EXCLUDED)
        if value > best:
            best, at = value, asked
        rise, asked = _highest(losses + overs @ at - best, overs, at, spread)
        if rise <= max(CONVERGED * abs(best), LEAST_RISE * widest):
            break
        spread = rise
    return at, best


def _highest(above: np.ndarray, overs: np.ndarray, at: np.ndarray, spread: float) -> tuple[float, np.ndarray]:
    """How far the lowest of planes rises above where it is at prices `at`, and the prices where it is highest.

    above: float64 [planes], at these prices. Measured in `spread`, so that HiGHS' tolerance is one of what is left.
    """
    from scipy.optimize import linprog

    above = above - above.min()  # which is 0, but for rounding
    near = above <= FAR * spread
    rows = np.column_stack([np.ones(near.sum()), -overs[near]])
    bounds = [(None, None), *((max(-one / spread, -FAR), FAR) for one in at.tolist())]
    answer = linprog([-1.0, 0.0, 0.0], rows, above[near] / spread, bounds=bounds)
    if answer.x is None:  # any prices give a bound, if not the best one
        return 0.0, at
    return spread * float(answer.x[0]), np.maximum(at + spread * answer.x[1:], 0.0)


def _closed(pair: _Pair, prices: np.ndarray, relaxed: float) -> tuple[np.ndarray, float]:
    """The best plan and a proven bound. Raises NoPairError if there is none."""
    reduced = pair.losses + (prices[:, None, None] * pair.shares).sum(axis=0)
    reduced -= reduced.min(axis=1, keepdims=True)
    second = np.partition(reduced, 1, axis=1)[:, 1] if reduced.shape[1] > 1 else np.zeros(len(reduced))
    view = _View(pair, reduced, prices, relaxed, float(reduced.sum(axis=1).max(initial=0.0)) + float(prices.sum()))
    width, proven = float(np.sort(second)[min(FIRST_OPEN, len(second)) - 1]), 0.0
    while True:
        try:
            found = _gone_through(view, width)
        except _TooManyError:
            return _bracketed(view, proven)
        if found is not None:
            return found, pair.loss(found)
        if width >= view.widest:
            raise NoPairError(EXCLUDED)
        proven, width = width, view.wider(width)


def _bracketed(view: _View, proven: float) -> tuple[np.ndarray, float]:
    """A good plan where there are too many to go through, and what is proven: no plan is within `proven` of the dual.

    HiGHS gets the units that a better plan may change, or the likeliest of them. Raises NoPairError if there is none.
    """
    best = _fitting(view)
    gap = math.inf if best is None else view.pair.loss(best) - view.relaxed
    second = np.sort(np.partition(view.reduced, 1, axis=1)[:, 1])
    width = min(gap, view.widest)
    if best is not None and len(second) > HIGHS_UNITS:
        width = min(width, float(second[HIGHS_UNITS]))
    try:
        answer = _by_highs(view, width)
    except BudgetError:
        if best is None:
            raise
        answer = None
    if best is None and answer is None:
        raise NoPairError(EXCLUDED)
    bound = view.relaxed + proven
    if answer is None:
        assert best is not None  # else there was an error
        return best, bound
    if best is None or view.pair.loss(answer[0]) < view.pair.loss(best):
        best = answer[0]
    return best, max(bound, min(answer[1], view.relaxed + width))


def _fitting(view: _View) -> np.ndarray | None:
    """A plan that fits: every unit's own at prices that are just high enough, and what is left spent by the best loss
    saved for it; None where no common rise of both prices fits."""
    pair = view.pair
    units, priced = np.arange(len(pair.losses)), (view.prices[:, None, None] * pair.shares).sum(axis=0)
    low, high = 1.0, 2.0
    while not pair.fits((pair.losses + high * priced).argmin(axis=1)):
        low, high = high, high * 4
        if high > HIGHEST_RISE:
            return None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if pair.fits((pair.losses + middle * priced).argmin(axis=1)) else (middle, high)
    columns = (pair.losses + high * priced).argmin(axis=1)
    for _ in range(FILLED):
        left = np.array(pair.rooms) - pair.steps[:, units, columns].sum(axis=1)
        saved = pair.losses[units, columns][:, None] - pair.losses
        extra = pair.steps - pair.steps[:, units, columns][:, :, None]
        able = (saved > 0) & (extra <= left[:, None, None]).all(axis=0)
        if not able.any():
            break
        spent = np.maximum(priced - priced[units, columns][:, None], 1e-300)
        unit, column = np.unravel_index(np.where(able, saved / spent, -1.0).argmax(), able.shape)
        columns[unit] = column
    return columns


def _gone_through(view: _View, width: float) -> np.ndarray | None:
    """The best plan within `width` of the dual; None without one. Raises _TooManyError."""
    pair, reduced, prices = view.pair, view.reduced, view.prices
    allowed = reduced <= width * (1 + 1e-9)
    settled = reduced.argmin(axis=1)
    core = np.flatnonzero(allowed.sum(axis=1) > 1)
    per_step = prices / np.maximum(pair.rooms, 1)
    # Those that cost most to move come first: few of their moves go together.
    core = core[np.argsort(-np.where(allowed[core], reduced[core], 0.0).max(axis=1), kind="stable")]
    fixed = np.setdiff1d(np.arange(len(reduced)), core, assume_unique=True)
    room = np.array(pair.rooms)[:, None]
    low, high = _rests(pair.steps[:, core], allowed[core])
    taken, excess = pair.steps[:, fixed, settled[fixed]].sum(axis=1)[:, None], np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for position, unit in enumerate(core):
        options = np.flatnonzero(allowed[unit])
        if len(excess) * len(options) > STATES:
            raise _TooManyError
        taken = (taken[:, :, None] + pair.steps[:, unit, options][:, None, :]).reshape(2, -1)
        excess = (excess[:, None] + reduced[unit, options]).ravel()
        slack = np.maximum(room - taken - high[:, position, None], 0)
        keep = (taken + low[:, position, None] <= room).all(axis=0)
        kept = np.flatnonzero(keep & (excess + per_step @ slack <= width * (1 + 1e-9)))
        if len(kept) > DENSE:
            kept = kept[_distinct(taken[:, kept], excess[kept])]
        history.append((kept // len(options), options[kept % len(options)]))
        taken, excess = taken[:, kept], excess[kept]
    if not len(excess):
        return None
    state = int((excess + per_step @ (room - taken)).argmin())
    columns = settled.copy()
    for unit, (parent, option) in zip(core[::-1], history[::-1], strict=True):
        columns[unit] = option[state]
        state = int(parent[state])
    return columns


def _rests(steps: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and most that the units after each still take, int64 [2, units]; steps, allowed: [(2,) units, choices]."""
    least = np.where(allowed, steps, np.iinfo(np.int64).max).min(axis=2)
    most = np.where(allowed, steps, -1).max(axis=2)
    low, high = (np.cumsum(one[:, ::-1], axis=1)[:, ::-1] - one for one in (least, most))
    return low, high


def _distinct(taken: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Of states that take the same of both rooms [2, states], the one of least excess [states]."""
    order = np.lexsort((excess, taken[1], taken[0]))
    new = np.append(True, (np.diff(taken[:, order], axis=1) != 0).any(axis=0))
    kept: np.ndarray = order[new]
    return kept


def _by_highs(view: _View, width: float) -> tuple[np.ndarray, float] | None:
    """The best plan of choices within `width` of their unit's best, and the bound of such plans; None if there is
    none. Raises BudgetError if HiGHS finds none in time."""
    pair, reduced = view.pair, view.reduced
    settled = reduced.argmin(axis=1)
    open_choices = reduced <= width
    core = np.flatnonzero(open_choices.sum(axis=1) > 1)
    fixed = np.setdiff1d(np.arange(len(reduced)), core, assume_unique=True)
    left = np.array(pair.rooms) - pair.steps[:, fixed, settled[fixed]].sum(axis=1)
    columns = np.where(open_choices[core], np.arange(reduced.shape[1]), settled[core, None])
    losses, costs, times = (np.take_along_axis(one[core], columns, 1) for one in (pair.losses, *pair.steps))
    if (np.array([costs.min(axis=1).sum(), times.min(axis=1).sum()]) > left).any():
        return None
    shared = int(np.gcd.reduce(times, axis=None)) or 1
    limit = SideConstraint(
        "a token's time", np.arange(len(core)), (times // shared).astype(float), 0, int(left[1]) // shared
    )
    try:
        solution = solve_milp(losses, costs, int(left[0]), [limit], TIME_LIMIT_S)
    except InfeasibleError:
        return None
    chosen = settled.copy()
    chosen[core] = columns[np.arange(len(core)), solution.columns]
    outside = float(pair.losses[fixed, settled[fixed]].sum())
    return chosen, outside + solution.lower_bound
