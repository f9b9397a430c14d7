"""From losses, bytes and limits to a solved plan.

Matrices that must agree form a unit. A choice that a pin, a bound or the engine forbids to a unit is not
removed from its row but replaced by a copy of one that is allowed, so that tables stay rectangular and
every solver sees only what may be chosen. The copy is of the dearest that costs no more, so that a ladder from
narrow to wide never gets cheaper on the way up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from alphaq.allocation.baselines import solve_ratio, solve_uniform_mix
from alphaq.allocation.exact import solve_exact
from alphaq.allocation.milp import SideConstraint, solve_milp
from alphaq.allocation.pair import NoPairError, solve_pair
from alphaq.allocation.solution import Solution
from alphaq.errors import BudgetError, TooSmallError
from alphaq.nouns.choice import Choice


@dataclass(frozen=True)
class Times:
    """What each matrix at each choice adds to a token's time, int64 [matrices, choices]; the most of all together, in
    nanoseconds.

    rest: nanoseconds beside them, which the limit is without.
    """

    table: np.ndarray
    limit: int
    rest: int


@dataclass(frozen=True)
class Problem:
    """What a budget allows.

    owner: int [matrices], the unit of each matrix. costs: int64 [matrices, choices], in the budget's unit. allowed:
    bool [matrices, choices]. limit: in the costs' unit. layers: int [units], −1 outside layers. ladder: columns of
    the plain choices from narrow to wide, for allocators that follow an order. times: a second budget, of a token's
    time.
    """

    units: tuple[str, ...]
    owner: np.ndarray
    choices: tuple[Choice, ...]
    costs: np.ndarray
    allowed: np.ndarray
    limit: int
    layers: np.ndarray
    ladder: tuple[int, ...]
    times: Times | None = None

    def per_unit(self, values: np.ndarray) -> np.ndarray:
        """Sums over each unit's matrices, [units, …] of [matrices, …]."""
        totals = np.zeros((len(self.units), *values.shape[1:]), values.dtype)
        np.add.at(totals, self.owner, values)
        return totals

    @cached_property
    def unit_allowed(self) -> np.ndarray:
        """bool [units, choices]: allowed to every matrix of the unit. Raises BudgetError for a unit without choice."""
        forbidden = self.per_unit((~self.allowed).astype(np.int64))
        empty = np.flatnonzero((forbidden > 0).all(axis=1))
        if len(empty):
            raise BudgetError(
                f"No choice is left for {self.units[empty[0]]!r}"
                + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
                + ": pins, bounds, --min-sqnr and what the engine can store exclude each other. Offer more with "
                "--choices (16 keeps a matrix), or relax one of them."
            )
        return forbidden == 0

    @cached_property
    def source(self) -> np.ndarray:
        """int [units, choices]: the column that stands for each choice, itself where allowed."""
        costs, allowed = self.per_unit(self.costs), self.unit_allowed
        stand_in = (
            np.where(allowed, costs, np.iinfo(np.int64).max).argmin(axis=1)[:, None].repeat(costs.shape[1], axis=1)
        )
        for column in range(costs.shape[1]):
            within = np.where(allowed & (costs <= costs[:, [column]]), costs, -1)
            affordable = within.max(axis=1) >= 0
            stand_in[affordable, column] = within.argmax(axis=1)[affordable]
        return np.where(allowed, np.arange(costs.shape[1]), stand_in)

    def allowed_only(self, table: np.ndarray) -> np.ndarray:
        """[units, choices] with forbidden entries replaced by their stand-in's."""
        return np.take_along_axis(table, self.source, axis=1)

    @cached_property
    def unit_costs(self) -> np.ndarray:
        """int64 [units, choices], only what is allowed."""
        return self.allowed_only(self.per_unit(self.costs))

    @cached_property
    def unit_times(self) -> np.ndarray:
        """int64 [units, choices], only what is allowed; of a problem with times."""
        assert self.times is not None  # the caller knows
        return self.allowed_only(self.per_unit(self.times.table))

    def chosen(self, columns: np.ndarray) -> np.ndarray:
        """int [matrices]: the column of each matrix for columns of units as a solver gives them."""
        return self.source[np.arange(len(self.units)), columns][self.owner]

    def check(self, describe: str, least: str) -> None:
        """Raise TooSmallError if even the cheapest plan exceeds the limit. least: what it costs."""
        floor = int(self.unit_costs.min(axis=1).sum())
        if floor > self.limit:
            raise TooSmallError(f"A budget of {describe} is below the least these choices can reach, {least}.")


def solve_losses(problem: Problem, losses: np.ndarray, per_layer: bool = False) -> Solution:
    """Least total loss for losses float64 [matrices, choices], exactly.

    per_layer: each layer may spend only its share of the budget, in proportion to its share of the plain widest
    choice's cost. Raises BudgetError if a loss is no number, naming it, or nothing fits.
    """
    totals = problem.per_unit(losses)
    bad = np.flatnonzero(~np.isfinite(totals).all(axis=1))
    if len(bad):
        raise BudgetError(
            f"The loss of {problem.units[bad[0]]!r} is NaN or infinite. Check its alpha and variance, or lower --gamma."
        )
    table = problem.allowed_only(totals)
    if problem.times is not None:
        return _solve_both(problem, table, problem.times, per_layer)
    if not per_layer:
        return solve_exact(table, problem.unit_costs, problem.limit)
    return solve_milp(table, problem.unit_costs, problem.limit, layer_budgets(problem))


def _solve_both(problem: Problem, table: np.ndarray, times: Times, per_layer: bool) -> Solution:
    """Least loss under both budgets. Raises BudgetError."""
    assert not per_layer  # which `resolve` refuses
    try:
        return solve_pair(table, problem.unit_costs, problem.limit, problem.unit_times, times.limit)
    except NoPairError as error:
        raise BudgetError(f"{error} Lower --min-speed, raise the budget, or allow other --choices.") from None


def layer_budgets(problem: Problem) -> list[SideConstraint]:
    """One constraint per layer: its share of the limit, in proportion to what its units cost at the widest rung."""
    weights = problem.per_unit(problem.costs)[:, problem.ladder[-1] if problem.ladder else -1]
    constraints = []
    for layer in sorted(set(problem.layers.tolist())):
        members = np.flatnonzero(problem.layers == layer)
        share = int(problem.limit * int(weights[members].sum()) // int(weights.sum()))
        costs = problem.unit_costs[members].astype(float)
        constraints.append(SideConstraint(f"the budget of layer {layer}", members, costs, -np.inf, share))
    return constraints


def solve_experts(problem: Problem, losses: np.ndarray, experts: Sequence[str]) -> Solution:
    """PMQ's problem: one choice per expert, equal budgets per layer, in each an expert at 3 bits and one at 2.

    experts: for each matrix the name of its expert. losses: float64 [matrices, choices]. Columns come back per
    unit of `problem`. The two counts are asked for only where the layer's budget lies between 2 and 3 bits: below
    and above, 2 and 3 bits would be far from what PMQ intends. Raises BudgetError if units span experts.
    """
    names = {key: number for number, key in enumerate(dict.fromkeys(experts))}
    owner = np.array([names[key] for key in experts])
    first = np.unique(owner, return_index=True)[1]
    whole = replace(
        problem,
        units=tuple(names),
        owner=owner,
        layers=problem.layers[problem.owner[first]],
    )
    if len(set(zip(problem.owner.tolist(), owner.tolist(), strict=True))) != len(problem.units):
        raise BudgetError("pmq chooses per expert, but this engine lets experts share a choice. Use another --method.")
    constraints = layer_budgets(whole)
    for layer_constraint in list(constraints):
        members = layer_constraint.units
        costs = whole.per_unit(whole.costs)[members]
        for bits in (2, 3):
            columns = [column for column in problem.ladder if problem.choices[column].bits == bits]
            between = [
                int(costs[:, column].sum()) for column in problem.ladder if problem.choices[column].bits in (2, 3)
            ]
            if columns and len(between) == 2 and between[0] < layer_constraint.upper < between[1]:
                counts = np.zeros((len(members), len(problem.choices)))
                counts[:, columns] = 1
                counts = counts[np.arange(len(members))[:, None], whole.source[members]]
                label = f"an expert at {bits} bits in {layer_constraint.label.removeprefix('the budget of ')}"
                constraints.append(SideConstraint(label, members, counts, 1, np.inf))
    solution = solve_milp(whole.allowed_only(whole.per_unit(losses)), whole.unit_costs, whole.limit, constraints)
    of_matrix = whole.chosen(solution.columns)
    per_unit = of_matrix[np.unique(problem.owner, return_index=True)[1]]
    return replace(solution, columns=per_unit)


def solve_order(problem: Problem, scores: np.ndarray | None, losses: np.ndarray) -> Solution:
    """Lift units above the widest rung that fits for all, highest score [matrices] first; None spreads evenly."""
    order = None if scores is None else np.argsort(-_mean(problem, scores), kind="stable")
    columns = solve_uniform_mix(order, problem.ladder, problem.unit_costs, problem.limit)
    return _described(problem, columns, losses)


def solve_shares(problem: Problem, scores: np.ndarray | None, losses: np.ndarray) -> Solution:
    """The reference's fixed ratio: lowest quarter of scores [matrices] one rung up, highest one rung down."""
    assert scores is not None  # methods of this kind have a rule
    columns = solve_ratio(_mean(problem, scores), problem.ladder, problem.unit_costs, problem.limit)
    return _described(problem, columns, losses)


RANKED: dict[str, Callable[[Problem, np.ndarray | None, np.ndarray], Solution]] = {
    "order": solve_order,
    "ratio": solve_shares,
}
"""Solvers of methods that give scores, by their kind; losses only describe what they choose."""


def _mean(problem: Problem, scores: np.ndarray) -> np.ndarray:
    return problem.per_unit(scores) / np.bincount(problem.owner)


def _described(problem: Problem, columns: np.ndarray, losses: np.ndarray) -> Solution:
    """An order minimises nothing, so its bound is −∞; its loss is told all the same."""
    units = np.arange(len(problem.units))
    objective = float(problem.allowed_only(problem.per_unit(losses))[units, columns].sum())
    return Solution(columns, objective, -np.inf, int(problem.unit_costs[units, columns].sum()))
