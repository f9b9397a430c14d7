"""What exchanging a unit's choice does to the measured KL, told from gradients at plans nearby.

Let KL be nearly quadratic in the weights. Moving a unit from Ŵₐ to Ŵᵦ while all else stays then changes it by the mean
of the slopes at both ends (the trapezoid rule, exact for quadratics):

    KL(b) − KL(a) = ½·⟨G(a) + G(b), Ŵᵦ − Ŵₐ⟩,

with G the gradient of KL by the weights. One backward pass gives G of all units, so plans are drawn in which every unit
is at its own choice or at a neighbour of it, and slopes are averaged by where the unit was. A straight-through gradient
of drawn choices (RCO, May 2026) averages the same slopes, but those at the likelier end count more there.

What few tokens tell poorly is drawn to what the plan's own losses say, by how well these agree with what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from alphaq.allocation.exact import solve_exact
from alphaq.nouns.plan import PlanTable

FORBIDDEN = np.nan


@dataclass(frozen=True, eq=False)
class Units:
    """What a plan's table says.

    names: [units]. members: matrices of each. losses: float64 [units, choices], NaN where a choice is forbidden. costs:
    int64 [units, choices].
    """

    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    choices: tuple[str, ...]
    losses: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(cls, table: PlanTable) -> Units:
        """The units of a table."""
        rows = [[FORBIDDEN if loss is None else loss for loss in row] for row in table.losses.values()]
        members = tuple(tuple(table.members.get(name, (name,))) for name in table.losses)
        costs = np.array(table.costs, dtype=np.int64)[np.array(table.cost_of, dtype=np.int64)]
        return cls(tuple(table.losses), members, table.choices, np.array(rows, dtype=float), costs)

    def neighbours(self, unit: int, column: int) -> tuple[int, ...]:
        """Columns next to a unit's own that may pay: the nearest cheaper and dearer corner of its convex hull."""
        corners = hull(self.costs[unit], self.losses[unit])
        cost = self.costs[unit, column]
        cheaper = [one for one in corners if self.costs[unit, one] < cost]
        dearer = [one for one in corners if self.costs[unit, one] > cost]
        return tuple(cheaper[-1:] + dearer[:1])

    def cost(self, columns: np.ndarray) -> int:
        """What a plan with these columns [units] costs."""
        return int(self.costs[np.arange(len(columns)), columns].sum())


def hull(costs: np.ndarray, losses: np.ndarray) -> list[int]:
    """Columns on the lower convex hull of (cost, loss), from cheap to dear while losses fall; NaN is left out."""
    order = [int(one) for one in np.lexsort((losses, costs)) if np.isfinite(losses[one])]
    corners: list[int] = []
    for one in order:
        if corners and losses[one] >= losses[corners[-1]]:
            continue
        while len(corners) > 1:
            before, last = corners[-2:]
            slope = (losses[last] - losses[before]) * (costs[one] - costs[before])
            if slope < (losses[one] - losses[before]) * (costs[last] - costs[before]):
                break
            corners.pop()
        corners.append(one)
    return corners


def drawn_states(units: Units, columns: np.ndarray, samples: int, seed: Sequence[int]) -> np.ndarray:
    """Columns of plans near one, int64 [samples, units]: each neighbour of a unit in a quarter of them."""
    generator = np.random.default_rng(seed)
    states = np.tile(columns, (samples, 1))
    quarter = max(1, samples // 4)
    for unit, column in enumerate(columns):
        order = generator.permutation(samples)
        for number, neighbour in enumerate(units.neighbours(unit, int(column))):
            states[order[number * quarter : (number + 1) * quarter], unit] = neighbour
    return states


@dataclass(eq=False)
class Slopes:
    """What was measured so far: by unit and pair of columns (a < b), values of ⟨G, Ŵᵦ − Ŵₐ⟩ with the unit at each."""

    values: dict[tuple[int, int, int], tuple[list[float], list[float]]] = field(default_factory=dict)

    def add(self, unit: int, at: int, products: Mapping[int, float]) -> None:
        """Take in ⟨G, Ŵ⟩ by column, of a gradient with the unit at the column `at`."""
        for other in products:
            if other != at:
                low, high = min(at, other), max(at, other)
                pair = self.values.setdefault((unit, low, high), ([], []))
                pair[at == high].append(products[high] - products[low])

    def change(self, unit: int, start: int, end: int) -> tuple[float, float] | None:
        """Expected change of KL by moving a unit, and its standard error; None where one end was not measured twice."""
        sign = 1.0 if start < end else -1.0
        ends = self.values.get((unit, min(start, end), max(start, end)), ([], []))
        if min(map(len, ends)) < 2:
            return None
        mean = sum(float(np.mean(one)) for one in ends) / 2
        variance = sum(float(np.var(one, ddof=1)) / len(one) for one in ends) / 4
        return sign * mean, float(np.sqrt(variance))


@dataclass(frozen=True, eq=False)
class Moves:
    """Possible moves from a plan: unit, column, change of KL in nats per token and its standard error, [moves] each."""

    units: np.ndarray
    columns: np.ndarray
    changes: np.ndarray
    errors: np.ndarray


def moves_from(units: Units, columns: np.ndarray, slopes: Slopes) -> Moves:
    """Every move to a neighbour that was measured, drawn to what the plan's losses say of it."""
    found: list[tuple[int, int, float, float, float]] = []
    for unit, own in enumerate(columns.tolist()):
        for column in units.neighbours(unit, own):
            if (change := slopes.change(unit, own, column)) is not None:
                predicted = float(units.losses[unit, column] - units.losses[unit, own])
                found.append((unit, column, change[0], change[1], predicted))
    rows = np.array(found, dtype=float).reshape(-1, 5)
    cheaper = rows[:, 4] > 0
    for side in (cheaper, ~cheaper):
        rows[side, 2], rows[side, 3] = _shrunk(rows[side, 2], rows[side, 3], rows[side, 4])
    return Moves(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), rows[:, 2], rows[:, 3])


def scaled_moves(units: Units, columns: np.ndarray, factors: np.ndarray) -> Moves:
    """Every move to a neighbour, by the plan's own losses times a factor of each unit, [units]; NaN for none."""
    found = [
        (unit, column, factors[unit] * (units.losses[unit, column] - units.losses[unit, own]), 0.0)
        for unit, own in enumerate(columns.tolist())
        if np.isfinite(factors[unit])
        for column in units.neighbours(unit, own)
    ]
    rows = np.array(found, dtype=float).reshape(-1, 4)
    return Moves(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), rows[:, 2], rows[:, 3])


def _shrunk(measured: np.ndarray, errors: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Changes drawn to a multiple of the predicted ones, and their standard errors (empirical Bayes).

    True changes are taken to be s·predicted·(1 + ε). The multiple s and the variance of ε come from those that are
    known well: weights are one over the variance that is to be expected.
    """
    if not len(measured) or not predicted.all():
        return measured, errors
    usual = abs(float(np.median(measured / predicted)))
    weights = 1.0 / np.maximum(errors**2 + (usual * predicted) ** 2, 1e-300)
    weights /= weights.max()  # their ratios decide, and squares of what is known for certain would be infinite
    factor = max(float((weights * measured * predicted).sum() / (weights * predicted**2).sum()), 0.0)
    if factor == 0.0:  # losses that say the contrary of what is measured say nothing
        return measured, errors
    prior = factor * predicted
    excess = float((weights**2 * ((measured - prior) ** 2 - errors**2)).sum())
    spread = max(excess, 0.0) / max(float((weights**2 * prior**2).sum()), 1e-300)
    own = spread * prior**2
    total = own + errors**2
    weight = np.divide(own, total, out=np.zeros_like(own), where=total > 0)
    return prior + weight * (measured - prior), np.sqrt(weight) * errors


def best_columns(units: Units, columns: np.ndarray, moves: Moves, caution: float, budget: int) -> np.ndarray:
    """The best plan within the moves and the budget, int64 [units].

    caution: standard errors by which a move must be better.
    """
    rows = np.arange(len(columns))
    shape = len(columns), len(units.choices)
    losses = np.zeros(shape)
    costs = np.repeat(units.costs[rows, columns][:, None], shape[1], axis=1)
    losses[moves.units, moves.columns] = moves.changes + caution * moves.errors
    costs[moves.units, moves.columns] = units.costs[moves.units, moves.columns]
    picked = solve_exact(losses, costs, budget).columns
    moved = np.zeros(shape, dtype=bool)
    moved[moves.units, moves.columns] = True
    return np.where(moved[rows, picked], picked, columns)


def exchanged(units: Units, before: Sequence[int], after: Sequence[int]) -> int:
    """How many units have another choice."""
    return sum(one != other for one, other in zip(before, after, strict=True))
