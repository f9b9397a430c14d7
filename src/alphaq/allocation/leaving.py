"""Exact multiple-choice knapsack in which groups of units may be left out altogether, each after those before it.

A chain is an order of groups: the experts of a layer, in the order in which it misses them least. Of chain c the first
k_c groups are left out, which loses b_c(k_c) and stores nothing; all other units choose as usual:

    min Σ_c b_c(k_c) + Σᵢ loss[i, xᵢ]   s.t.   Σᵢ cost[i, xᵢ] − Σ_c saved_c(k_c) ≤ budget,   Σ_c b_c(k_c) ≤ most,

over the units i that stay. For a price λ of bytes and μ of what leaving out may lose, chains part from each other:

    L(λ, μ) = Σ_c min_k [(1 + μ)·b_c(k) − λ·saved_c(k) + Σ vᵢ of the groups after k] + Σ vᵢ of all other units
              − λ·budget − μ·most,   vᵢ = minⱼ loss + λ·cost,

which never exceeds the optimum. Its maximum is found by cuts (pair.py). For known counts k the rest is the plain
problem, which exact.py solves. Counts are settled by branch and bound: at the best prices a count that is worse than
its chain's best by more than the gap is in no better plan, which leaves few; of these one chain's are parted in two.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from alphaq.allocation.exact import solve_exact
from alphaq.allocation.pair import NoPairError, best_prices
from alphaq.allocation.solution import Solution
from alphaq.errors import BudgetError, TooSmallError

NODES = 200  # that are looked at; then a proven gap may stay
TOLERANCE = 1e-10  # of the loss
NUDGES = (1.0, 1 - 1e-7, 1 + 1e-7, 1.001, 1.03, 1.3, 3.0, 30.0, 1e4, 1e8)
"""Times the best prices, at which counts are tried until a plan fits."""


@dataclass(frozen=True)
class Chains:
    """What may be left out. owner: int [units], the chain of each, −1 where it always stays. place: int [units], of its
    group in the chain. losses: float64 [chains, counts] of leaving out the first 0, 1, … groups, inf where that is not
    open. saved: int64 [chains, counts], what that saves beside the units' costs. most: that it may lose in all."""

    owner: np.ndarray
    place: np.ndarray
    losses: np.ndarray
    saved: np.ndarray
    most: float

    def stay(self, counts: np.ndarray) -> np.ndarray:
        """bool [units]: which stay if so many groups of each chain go."""
        stays: np.ndarray = (self.owner < 0) | (self.place >= counts[self.owner])
        return stays

    def lost(self, counts: np.ndarray) -> float:
        """What leaving out so many of each chain loses."""
        return float(self.losses[np.arange(len(counts)), counts].sum())


@dataclass(frozen=True)
class Leaving:
    """counts: int [chains], how many groups go. objective: loss of all, what is left out included; no plan loses less
    than lower_bound."""

    counts: np.ndarray
    objective: float
    lower_bound: float


def solve_leaving(losses: np.ndarray, costs: np.ndarray, budget: int, chains: Chains) -> Leaving:
    """The best counts for losses [units, choices] (float64) and costs (int64).

    Ties go to fewer groups that go. Raises TooSmallError if nothing fits, BudgetError if a loss is not finite.
    """
    if not np.isfinite(losses).all():
        raise BudgetError("A loss is NaN or infinite, so no plan can be optimal. Check the stats for bad values.")
    open_counts = np.isfinite(chains.losses) & (chains.losses <= chains.most)
    return _Search(losses, costs, budget, chains).run(open_counts)


@dataclass(order=True)
class _Node:
    """Counts that are still open, bool [chains, counts], and what no plan of them loses less than."""

    bound: float
    number: int
    open_counts: np.ndarray = field(compare=False)


@dataclass
class _Search:
    losses: np.ndarray
    costs: np.ndarray
    budget: int
    chains: Chains
    upper: float = math.inf
    best: np.ndarray | None = None
    proven: float = math.inf
    """What plans that were not gone through lose at least."""
    tried: dict[bytes, Solution | None] = field(default_factory=dict)

    def run(self, open_counts: np.ndarray) -> Leaving:
        heap = [_Node(-math.inf, 0, open_counts)]
        for number in range(NODES):
            if not heap or heap[0].bound >= self._cutoff:
                break
            for part in self._parts(heapq.heappop(heap), 2 * number):
                heapq.heappush(heap, part)
        if self.best is None:
            raise TooSmallError(f"The budget of {self.budget} is below what any plan costs, groups left out included.")
        bound = min([self.upper, self.proven, *(node.bound for node in heap)])
        return Leaving(self.best, self.upper, bound)

    @property
    def _cutoff(self) -> float:
        return self.upper - TOLERANCE * abs(self.upper) if math.isfinite(self.upper) else math.inf

    def _parts(self, node: _Node, number: int) -> list[_Node]:
        """The node in two, without counts that no better plan has; none where it is settled."""
        if not node.open_counts.any(axis=1).all():
            return []
        if (node.open_counts.sum(axis=1) == 1).all():
            self._settle(node.open_counts.argmax(axis=1))
            return []
        try:
            prices, bound = best_prices(lambda prices: self._cheapest(prices, node), *self._spread)
        except NoPairError:
            return []
        self._try_near(prices, node)
        if bound >= self._cutoff:
            self.proven = min(self.proven, bound)
            return []
        values = self._values(prices, node.open_counts)[1]
        worse = values - values.min(axis=1, keepdims=True)
        within = node.open_counts & (bound + worse < self._cutoff)
        if (node.open_counts & ~within).any():
            self.proven = min(self.proven, self._cutoff)
        if (within.sum(axis=1) == 1).all():
            self._settle(within.argmax(axis=1))
            return []
        return _parted(within, worse, bound, number)

    def _settle(self, counts: np.ndarray) -> None:
        """Try the one plan that is left."""
        solution = self._take(counts)
        if solution is not None:
            self.proven = min(self.proven, self.chains.lost(counts) + solution.lower_bound)

    def _try_near(self, prices: np.ndarray, node: _Node) -> None:
        """Counts that are best at these prices, and near them; higher ones only until a plan fits."""
        for nudge in NUDGES:
            if nudge > 1 and self.best is not None:
                break
            self._take(self._values(nudge * prices, node.open_counts)[1].argmin(axis=1))

    def _take(self, counts: np.ndarray) -> Solution | None:
        """Solve for these counts; None if nothing fits."""
        key = counts.tobytes()
        if key not in self.tried:
            self.tried[key] = self._solved(counts)
            solution = self.tried[key]
            if solution is not None and (total := self.chains.lost(counts) + solution.objective) < self.upper:
                self.upper, self.best = total, counts
        return self.tried[key]

    def _solved(self, counts: np.ndarray) -> Solution | None:
        if self.chains.lost(counts) > self.chains.most:
            return None
        stays, saved = self.chains.stay(counts), self.chains.saved[np.arange(len(counts)), counts].sum()
        costs, budget = self.costs[stays], self.budget + int(saved)
        if int(costs.min(axis=1).sum()) > budget:
            return None
        return solve_exact(self.losses[stays], costs, budget)

    @cached_property
    def _spread(self) -> tuple[float, float]:
        """The largest loss of a plan, and by how much losses can differ."""
        most = float(self.losses.max(axis=1).sum()) + self._most_lost
        least = float(np.minimum(self.losses, 0.0).min(axis=1).sum())
        return most, most - least

    @cached_property
    def _most_lost(self) -> float:
        """By what is left out: the limit, or that of all chains if it never binds."""
        every = np.where(np.isfinite(self.chains.losses), self.chains.losses, 0.0).max(axis=1).sum()
        return min(self.chains.most, float(every))

    @cached_property
    def _rooms(self) -> tuple[float, float]:
        """Units that prices are counted in: of bytes, and of what leaving out may lose."""
        room = self.budget - int(self.costs.min(axis=1).sum()) + int(self.chains.saved.max(axis=1).sum())
        return float(max(abs(room), 1)), max(self._most_lost, 1e-300)

    def _values(self, prices: np.ndarray, open_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each unit's own column at these prices, and what each count of each chain comes to, [chains, counts]."""
        rooms, chains = self._rooms, self.chains
        price, extra = prices[0] / rooms[0], 1 + prices[1] / rooms[1]
        priced = self.losses + price * self.costs
        columns = priced.argmin(axis=1)
        own = np.flatnonzero(chains.owner >= 0)
        groups = np.zeros(chains.losses.shape)
        np.add.at(groups, (chains.owner[own], chains.place[own]), priced[own, columns[own]])
        after = np.cumsum(groups[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore"):
            values = after + extra * chains.losses - price * chains.saved
        return columns, np.where(open_counts, values, np.inf)

    def _cheapest(self, prices: np.ndarray, node: _Node) -> tuple[float, np.ndarray]:
        """Loss of what is best at these prices, and by how much it exceeds both limits, in their rooms."""
        columns, values = self._values(prices, node.open_counts)
        counts = values.argmin(axis=1)
        stays = self.chains.stay(counts)
        units = np.flatnonzero(stays)
        lost, rooms = self.chains.lost(counts), self._rooms
        cost = int(self.costs[units, columns[units]].sum()) - int(
            self.chains.saved[np.arange(len(counts)), counts].sum()
        )
        loss = float(self.losses[units, columns[units]].sum()) + lost
        return loss, np.array([(cost - self.budget) / rooms[0], (lost - self._most_lost) / rooms[1]])


def _parted(within: np.ndarray, worse: np.ndarray, bound: float, number: int) -> list[_Node]:
    """A node in two, between the best two counts of the chain that is least settled."""
    second = np.where(within.sum(axis=1) > 1, np.partition(np.where(within, worse, np.inf), 1, axis=1)[:, 1], np.inf)
    chain = int(second.argmin())
    first, other = np.argsort(np.where(within[chain], worse[chain], np.inf), kind="stable")[:2]
    fewer = np.arange(within.shape[1]) <= min(first, other)
    parts = []
    for half, allowed in enumerate((fewer, ~fewer)):
        open_counts = within.copy()
        open_counts[chain] &= allowed
        parts.append(_Node(bound, number + half, open_counts))
    return parts
