"""The budget slider: what the page's script moves along, and what the page says of the path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alphaq.errors import PlanError
from alphaq.nouns.plan import Plan, PlanTable
from alphaq.report.arrays import PackedArray, packed, packed_counts
from alphaq.report.path import BudgetPath, budget_path, tables_of

LARGEST_TOTAL = 1e37  # the page keeps losses in float32
NO_CHOICE = -1


@dataclass(frozen=True)
class SliderData:
    """unit: of each matrix. columns: the page's number of each of the table's choices. start: choice of each unit at
    the cheapest plan. climbs: steps of each unit. step_column, saved: of each step, unit by unit. cost_of, costs: the
    table's. plan_column: choice of each unit in the plan."""

    unit: PackedArray
    columns: list[int]
    start: PackedArray
    start_loss: PackedArray
    start_cost: int
    final_loss: float
    climbs: PackedArray
    step_column: PackedArray
    saved: PackedArray
    cost_of: PackedArray
    costs: PackedArray
    plan_column: PackedArray
    plan_cost: int
    plan_loss: float
    slack: float
    unit_of_cost: str
    price: float | None


@dataclass(frozen=True)
class PathFacts:
    """loss, cost: of the path at the plan's budget. difference: the path's loss over the plan's, as a ratio − 1. above:
    how much of its bytes the plan could save at its own loss. bound_by_more: whether more than a budget decided.
    shared: whether several matrices share a choice."""

    steps: int
    units: int
    loss: float
    cost: int
    plan_cost: int
    plan_loss: float
    difference: float
    above: float | None
    cost_unit: str
    bound_by_more: bool
    shared: bool


@dataclass(frozen=True)
class _Table:
    """A plan's table: losses, costs [units, choices], the unit of each matrix, the column of each unit in the plan."""

    losses: np.ndarray
    costs: np.ndarray
    unit_of: np.ndarray
    chosen: np.ndarray

    @property
    def plan_cost(self) -> int:
        """Summed cost of what was chosen."""
        return int(self.costs[np.arange(len(self.chosen)), self.chosen].sum())

    @property
    def plan_loss(self) -> float:
        """Summed loss of what was chosen."""
        return float(self.losses[np.arange(len(self.chosen)), self.chosen].sum())


def slider_of(
    plan: Plan, table: PlanTable, names: Sequence[str], column_of: Mapping[str, int]
) -> tuple[SliderData, PathFacts]:
    """Of a plan's own table. Raises PlanError for one that contradicts the plan's choices.

    names: the planned matrices. column_of: the page's number of each choice.
    """
    read = _read(plan, table, names)
    path = budget_path(read.losses, read.costs)
    return _data(plan, table, read, path, column_of), _facts(plan, read, path)


def _read(plan: Plan, table: PlanTable, names: Sequence[str]) -> _Table:
    losses, costs = tables_of(table)
    allowed = losses[np.isfinite(losses)]
    totals = float(np.abs(allowed).sum()), float(costs.max(axis=1, initial=0).astype(float).sum())
    if not totals[0] < LARGEST_TOTAL or not totals[1] < 2**53:
        raise PlanError("The plan's losses or costs are beyond what a page can count with. Make it with `alphaq plan`.")
    empty = np.flatnonzero(~np.isfinite(losses).any(axis=1))
    units = list(table.losses)
    if len(empty):
        raise PlanError(f"The plan's table offers {units[empty[0]]!r} no choice. Make it again with `alphaq plan`.")
    number_of = {member: number for number, unit in enumerate(units) for member in table.members.get(unit, (unit,))}
    if absent := [name for name in names if name not in number_of]:
        raise PlanError(f"The plan's table lacks {absent[0]!r}. Make it again with `alphaq plan`.")
    unit_of = np.array([number_of[name] for name in names])
    return _Table(losses, costs, unit_of, _chosen(plan, table, names, unit_of, losses))


def _chosen(plan: Plan, table: PlanTable, names: Sequence[str], unit_of: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The table's column of each unit's choice, int [units]."""
    chosen = np.full(len(losses), NO_CHOICE)
    for name, unit in zip(names, unit_of, strict=True):
        choice = plan.choices[name]
        column = table.choices.index(choice) if choice in table.choices else NO_CHOICE
        if column == NO_CHOICE or not np.isfinite(losses[unit, column]) or chosen[unit] not in (NO_CHOICE, column):
            raise PlanError(
                f"The plan's table does not offer {name!r} its choice {choice!r}, so the plan was edited since it was "
                "made. Make it again with `alphaq plan`."
            )
        chosen[unit] = column
    return chosen


def _data(plan: Plan, table: PlanTable, read: _Table, path: BudgetPath, column_of: Mapping[str, int]) -> SliderData:
    # Unit by unit, which spares a number of four bytes for every step; the page sorts them again by what they save.
    by_unit = np.argsort(path.units, kind="stable")
    return SliderData(
        unit=packed_counts(read.unit_of),
        columns=[column_of[choice] for choice in table.choices],
        start=packed_counts(path.start),
        start_loss=packed(path.start_losses, "f4"),
        start_cost=path.start_cost,
        final_loss=path.final_loss,
        climbs=packed_counts(np.bincount(path.units, minlength=len(read.losses))),
        step_column=packed_counts(path.columns[by_unit]),
        saved=packed(path.saved[by_unit], "f4"),
        cost_of=packed_counts(np.array(table.cost_of, np.int64)),
        costs=packed(np.array(table.costs, np.float64).ravel(), "f8"),
        plan_column=packed_counts(read.chosen),
        plan_cost=read.plan_cost,
        plan_loss=read.plan_loss,
        slack=plan.budget_slack or 0.0,
        unit_of_cost=plan.cost_unit,
        price=plan.price,
    )


def _facts(plan: Plan, read: _Table, path: BudgetPath) -> PathFacts:
    cost, loss = read.plan_cost, read.plan_loss
    at = path.steps_within(cost + (plan.budget_slack or 0.0))
    return PathFacts(
        steps=len(path),
        units=len(read.losses),
        loss=float(path.losses[at]),
        cost=int(path.costs[at]),
        plan_cost=cost,
        plan_loss=loss,
        difference=float(path.losses[at] - loss) / loss if loss else 0.0,
        above=_above(path, cost, loss),
        cost_unit=plan.cost_unit,
        bound_by_more=plan.price is None or (plan.config is not None and plan.config.per_layer),
        shared=len(read.losses) != len(read.unit_of),
    )


def _above(path: BudgetPath, cost: int, loss: float) -> float | None:
    """How much of its bytes a plan could save at its own loss, as a share; None where it is on the path or below."""
    steps = int(np.searchsorted(-path.losses, -loss, side="left"))
    if steps >= len(path.costs) or path.costs[steps] >= cost:
        return None
    return 1 - float(path.costs[steps]) / cost
