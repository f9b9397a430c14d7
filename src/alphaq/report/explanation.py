"""Why a unit got its choice, from the plan file alone.

At price μ per unit of cost every unit takes the choice of least loss + μ·cost. Multiplying one unit's losses by t
moves it to a dearer choice j once t·(loss − lossⱼ) > μ·(costⱼ − cost), so the least such t says how far it is
from moving up; the largest t below 1 with the opposite sign, how far from moving down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from alphaq.errors import PlanError
from alphaq.nouns.plan import Plan, PlanTable
from alphaq.nouns.settings import Budget, names
from alphaq.report.tables import check_words, dropped_words, kept_text, plain_table, predicted_words, refined_words


@dataclass(frozen=True)
class ExplainedChoice:
    """A choice that a unit had. loss: None where it is not allowed. gain_per_cost: against the unit's own choice."""

    choice: str
    loss: float | None
    cost: int
    gain_per_cost: float | None


@dataclass(frozen=True)
class ExplainedUnit:
    """A unit and its choice. alpha: mean over its matrices, alpha_rank of so many `alphas`, 1 for the heaviest tail.
    moves_up_at, moves_down_at: what its losses would have to be multiplied by."""

    unit: str
    matrices: int
    choice: str
    alpha: float | None
    alpha_rank: int | None
    alphas: int
    loss: float
    cost: int
    moves_up_at: float | None
    moves_down_at: float | None
    choices: list[ExplainedChoice]

    @property
    def distance(self) -> float:
        """How far it is from moving, as the logarithm of a factor."""
        return min((abs(math.log(at)) for at in (self.moves_up_at, self.moves_down_at) if at), default=math.inf)


@dataclass(frozen=True)
class Explanation:
    """Of a plan, and of some of its units. unpriced: why it has no price, if so. matched: how many units were asked
    for."""

    engine: str
    method: str | None
    budget: Budget | None
    objective: float | None
    lower_bound: float | None
    price: float | None
    cost_unit: str
    kept: Mapping[str, float]
    check: str | None
    refined: str | None
    dropped: str | None
    unpriced: str | None
    predicted: str | None
    matched: int
    units: list[ExplainedUnit]


def explain_plan(plan: Plan, pattern: str | None, limit: int = 10) -> Explanation:
    """Figures of the units that `pattern` names; without one, of those nearest to moving.

    Raises PlanError if the plan holds no table, or nothing matches.
    """
    table = plan.table
    if table is None:
        raise PlanError("The plan does not say what it was made of (no table). Make it again with `alphaq plan`.")
    alphas = sorted(plan.alpha.values())
    units = []
    for position, unit in enumerate(table.losses):
        members = table.members.get(unit, (unit,))
        if pattern is None or any(pattern in name or names(pattern, name) for name in (unit, *members)):
            units.append(_explained(plan, table, position, unit, members, alphas))
    if not units:
        raise PlanError(f"No planned matrix matches {pattern!r}. Names look like {next(iter(table.losses))!r}.")
    if pattern is None:
        units.sort(key=lambda unit: unit.distance)
    return Explanation(
        engine=plan.engine,
        method=plan.method,
        budget=None if plan.settings is None else plan.settings.budget,
        objective=plan.objective,
        lower_bound=plan.lower_bound,
        price=plan.price,
        cost_unit=plan.cost_unit,
        kept=plan.kept,
        check=None if plan.check is None else check_words(plan.check),
        refined=None if plan.refined is None else refined_words(plan.refined),
        dropped=None if plan.dropped is None else dropped_words(plan.dropped),
        unpriced=_unpriced(plan),
        predicted=None if plan.prediction is None else predicted_words(plan.prediction),
        matched=len(units),
        units=units[:limit],
    )


def _unpriced(plan: Plan) -> str | None:
    """Why no one price tells a plan's choices; None where one does."""
    if plan.price is not None:
        return None
    if plan.refined is not None and plan.refined.changed:
        return "its choices were exchanged by measured KL, so no price of these losses tells them"
    return "it follows an order, or has limits beside the budget, so there is no single price"


def _explained(
    plan: Plan, table: PlanTable, position: int, unit: str, members: tuple[str, ...], alphas: list[float]
) -> ExplainedUnit:
    chosen = plan.choices.get(members[0], "")
    choices = _choices(table, position, unit, chosen)
    own = next(one for one in choices if one.choice == chosen)
    assert own.loss is not None  # `_choices` looks
    up, down = _moves(choices, own.loss, own.cost, max(plan.price or 0.0, 0.0))
    known = [plan.alpha[name] for name in members if name in plan.alpha]
    alpha = sum(known) / len(known) if known else None
    return ExplainedUnit(
        unit=unit,
        matrices=len(members),
        choice=chosen,
        alpha=alpha,
        alpha_rank=None if alpha is None else 1 + sum(other < alpha for other in alphas),
        alphas=len(alphas),
        loss=own.loss,
        cost=own.cost,
        moves_up_at=up,
        moves_down_at=down,
        choices=choices,
    )


def _choices(table: PlanTable, position: int, unit: str, chosen: str) -> list[ExplainedChoice]:
    """What a unit could have had. Raises PlanError where its own choice is not among it."""
    losses, costs = table.losses[unit], table.costs[table.cost_of[position]]
    loss = losses[table.choices.index(chosen)] if chosen in table.choices else None
    if loss is None:
        raise PlanError(
            f"The plan's table does not offer {unit!r} its choice {chosen!r}, so the plan was edited since it was "
            "made. Make it again with `alphaq plan`."
        )
    cost = costs[table.choices.index(chosen)]
    return [
        ExplainedChoice(
            name,
            other,
            other_cost,
            None if other is None or other_cost == cost else (loss - other) / (other_cost - cost),
        )
        for name, other, other_cost in zip(table.choices, losses, costs, strict=True)
    ]


def _moves(choices: list[ExplainedChoice], loss: float, cost: int, price: float) -> tuple[float | None, float | None]:
    """What a unit's losses would have to be multiplied by for it to move up, and down; None where nothing would do."""
    up, down = math.inf, 0.0
    for other in choices:
        if other.loss is None or not price:
            continue
        gain, extra = loss - other.loss, other.cost - cost
        if extra > 0 and gain > 0:
            up = min(up, price * extra / gain)
        if extra < 0 and gain < 0:
            down = max(down, price * extra / gain)
    return None if math.isinf(up) else up, down or None


def explanation_tables(explained: Explanation) -> list[Any]:
    """What `alphaq explain` prints: the price, and for each unit its choices and its distance from moving."""
    price, unit = explained.price, explained.cost_unit.removesuffix("s")
    total = "" if explained.objective is None else f" of a loss of {explained.objective:.6g}"
    lines: list[Any] = [
        f"{explained.engine} plan by {explained.method}: "
        + (explained.unpriced or f"one more {unit} would save {price:.4g}{total}"),
        f"{explained.matched:,} unit{'s match' if explained.matched > 1 else ' matches'}; "
        f"showing {len(explained.units)}",
    ]
    if explained.predicted:
        lines.append(f"predicted KL, nats per token: {explained.predicted}")
    if explained.check:
        lines.append(f"beside uniform bits in these bytes: {explained.check}")
    if explained.dropped:
        lines.append(f"experts dropped: {explained.dropped}")
    if explained.refined:
        lines.append(f"refined: {explained.refined}")
    if explained.kept:
        lines.append(f"in 16 bits, of all parameters: {kept_text(explained.kept)}")
    lines += [_unit_table(unit, price) for unit in explained.units]
    return lines


def _unit_table(unit: ExplainedUnit, price: float | None) -> Table:
    alpha = (
        "α undefined"
        if unit.alpha is None
        else f"α {unit.alpha:.3f} (rank {unit.alpha_rank:,} of {unit.alphas:,}; 1 is the heaviest tail)"
    )
    table = plain_table(f"{unit.unit}: {unit.choice}, {alpha}", "choice", "loss", "cost", "gain per cost", "")
    for row in unit.choices:
        if row.loss is None:
            table.add_row(row.choice, "–", f"{row.cost:,}", "–", "not allowed")
            continue
        here = row.choice == unit.choice
        rate = row.gain_per_cost
        verdict = "chosen" if here else ""
        if price and rate is not None and not here:
            if row.cost > unit.cost:
                verdict = f"{rate / price:.2f} × the price: too little" if rate < price else "would pay"
            else:
                verdict = f"saves at {rate / price:.2f} × the price"
        table.add_row(
            row.choice,
            f"{row.loss:.4g}",
            f"{row.cost:,}",
            "" if rate is None else f"{rate:.4g}",
            verdict,
            style="bold" if here else "",
        )
    moves = []
    if unit.moves_up_at:
        moves.append(f"up if its losses were {unit.moves_up_at:.3g} × as large")
    if (unit.moves_down_at or 0) > 1 + 1e-9:
        moves.append("nowhere down: it took bytes that were left over")
    elif unit.moves_down_at:
        moves.append(f"down at {unit.moves_down_at:.3g} ×")
    table.caption = "moves " + ", ".join(moves) if moves else None
    table.caption_justify = "left"
    return table
