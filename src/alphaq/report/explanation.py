"""Why a unit got its choice, from the plan file alone.

At price μ per unit of cost every unit takes the choice of least loss + μ·cost. Multiplying one unit's losses by t
moves it to a dearer choice j once t·(loss − lossⱼ) > μ·(costⱼ − cost), so the least such t says how far it is
from moving up; the largest t below 1 with the opposite sign, how far from moving down.
"""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from alphaq.errors import PlanError
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import names
from alphaq.report.tables import check_words, kept_text, plain_table


def explain_plan(plan: Plan, pattern: str | None, limit: int = 10) -> dict[str, Any]:
    """Figures of the units that `pattern` names; without one, of those nearest to moving.

    Raises PlanError if the plan holds no table, or nothing matches.
    """
    table = plan.table
    if table is None:
        raise PlanError("The plan does not say what it was made of (no table). Make it again with `alphaq plan`.")
    alphas = sorted(plan.alpha.values())
    units = []
    for position, (unit, losses) in enumerate(table.losses.items()):
        members = table.members.get(unit, (unit,))
        if pattern is not None and not any(pattern in name or names(pattern, name) for name in (unit, *members)):
            continue
        costs = table.costs[table.cost_of[position]]
        chosen = plan.choices.get(members[0], "")
        if chosen not in table.choices or losses[table.choices.index(chosen)] is None:
            raise PlanError(
                f"The plan's table does not offer {unit!r} its choice {chosen!r}, so the plan was edited since it was "
                "made. Make it again with `alphaq plan`."
            )
        units.append(_explained(plan, unit, members, chosen, losses, costs, alphas))
    if not units:
        raise PlanError(f"No planned matrix matches {pattern!r}. Names look like {next(iter(table.losses))!r}.")
    matched = len(units)
    if pattern is None:
        units.sort(key=_distance)
    return {
        "engine": plan.engine,
        "method": plan.method,
        "budget": None if plan.config is None else plan.config.budget.model_dump(),
        "objective": plan.objective,
        "lower_bound": plan.lower_bound,
        "price": plan.price,
        "cost_unit": plan.cost_unit,
        "kept": plan.kept,
        "check": None if plan.check is None else check_words(plan.check),
        "matched": matched,
        "units": units[:limit],
    }


def _distance(unit: dict[str, Any]) -> float:
    ways = [abs(math.log(unit[key])) for key in ("moves_up_at", "moves_down_at") if unit[key]]
    return min(ways, default=math.inf)


def _explained(
    plan: Plan,
    unit: str,
    members: tuple[str, ...],
    chosen: str,
    losses: tuple[float | None, ...],
    costs: tuple[int, ...],
    alphas: list[float],
) -> dict[str, Any]:
    assert plan.table is not None  # checked before
    at = plan.table.choices.index(chosen)
    loss, cost = losses[at], costs[at]
    assert loss is not None  # a chosen choice is allowed
    choices: list[dict[str, Any]] = []
    price = max(plan.price or 0.0, 0.0)
    up, down = math.inf, 0.0
    for name, other, other_cost in zip(plan.table.choices, losses, costs, strict=True):
        if other is None:
            choices.append({"choice": name, "loss": None, "cost": other_cost, "gain_per_cost": None})
            continue
        gain, extra = loss - other, other_cost - cost
        rate = gain / extra if extra else None
        choices.append({"choice": name, "loss": other, "cost": other_cost, "gain_per_cost": rate})
        if price and extra > 0 and gain > 0:
            up = min(up, price * extra / gain)
        if price and extra < 0 and gain < 0:
            down = max(down, price * extra / gain)
    own = [plan.alpha[name] for name in members if name in plan.alpha]
    alpha = sum(own) / len(own) if own else None
    return {
        "unit": unit,
        "matrices": len(members),
        "choice": chosen,
        "alpha": alpha,
        "alpha_rank": None if alpha is None else 1 + sum(other < alpha for other in alphas),
        "alphas": len(alphas),
        "loss": loss,
        "cost": cost,
        "moves_up_at": None if math.isinf(up) else up,
        "moves_down_at": down or None,
        "choices": choices,
    }


def explanation_tables(explained: dict[str, Any]) -> list[Any]:
    """What `alphaq explain` prints: the price, and for each unit its choices and its distance from moving."""
    price, unit = explained["price"], explained["cost_unit"].removesuffix("s")
    total = "" if explained["objective"] is None else f" of a loss of {explained['objective']:.6g}"
    order = "it follows an order, or has limits beside the budget, so there is no single price" if price is None else ""
    lines: list[Any] = [
        f"{explained['engine']} plan by {explained['method']}: "
        + (order or f"one more {unit} would save {price:.4g}{total}"),
        f"{explained['matched']:,} unit{'s match' if explained['matched'] > 1 else ' matches'}; "
        f"showing {len(explained['units'])}",
    ]
    if explained["check"]:
        lines.append(f"beside uniform bits in these bytes: {explained['check']}")
    if explained["kept"]:
        lines.append(f"in 16 bits, of all parameters: {kept_text(explained['kept'])}")
    lines += [_unit_table(unit, price) for unit in explained["units"]]
    return lines


def _unit_table(unit: dict[str, Any], price: float | None) -> Table:
    alpha = (
        "α undefined"
        if unit["alpha"] is None
        else f"α {unit['alpha']:.3f} (rank {unit['alpha_rank']:,} of {unit['alphas']:,}; 1 is the heaviest tail)"
    )
    table = plain_table(f"{unit['unit']}: {unit['choice']}, {alpha}", "choice", "loss", "cost", "gain per cost", "")
    for row in unit["choices"]:
        if row["loss"] is None:
            table.add_row(row["choice"], "–", f"{row['cost']:,}", "–", "not allowed")
            continue
        here = row["choice"] == unit["choice"]
        rate = row["gain_per_cost"]
        verdict = "chosen" if here else ""
        if price and rate is not None and not here:
            if row["cost"] > unit["cost"]:
                verdict = f"{rate / price:.2f} × the price: too little" if rate < price else "would pay"
            else:
                verdict = f"saves at {rate / price:.2f} × the price"
        table.add_row(
            row["choice"],
            f"{row['loss']:.4g}",
            f"{row['cost']:,}",
            "" if rate is None else f"{rate:.4g}",
            verdict,
            style="bold" if here else "",
        )
    moves = []
    if unit["moves_up_at"]:
        moves.append(f"up if its losses were {unit['moves_up_at']:.3g} × as large")
    if (unit["moves_down_at"] or 0) > 1 + 1e-9:
        moves.append("nowhere down: it took bytes that were left over")
    elif unit["moves_down_at"]:
        moves.append(f"down at {unit['moves_down_at']:.3g} ×")
    table.caption = "moves " + ", ".join(moves) if moves else None
    table.caption_justify = "left"
    return table
