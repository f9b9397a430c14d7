"""What the page shows, as plain values and compact arrays: the functional part of a report, no file written.

A model may have 70 000 matrices with 24 choices each. Names are kept as templates and numbers; the budget path as one
column and one float32 per step; densities as 16-bit counts of a sample of the matrices. All of it becomes
base64 in one JSON document.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from alphaq.errors import PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.report.commands import Names, reproduce
from alphaq.report.path import BudgetPath, budget_path, tables_of
from alphaq.report.places import Place, place_by_name
from alphaq.report.runs import ComparedRow, Run
from alphaq.report.tables import check_words, human_bytes
from alphaq.spectra.density import Density

MAX_DENSITIES = 2000
"""Matrices whose spectra are kept at most, of those sampled: 2000 take 0.3 MB, and an eigenvalue solver minutes."""
SAME_SIZE = 1e-3
LARGEST_TOTAL = 1e37  # the page keeps losses in float32
NO_MATRIX = -1
_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")


@dataclass(frozen=True)
class Sources:
    """What the report knows beside the plan.

    places: by matrix, from a model or a stats file; `known_from` names which. alphas: from a stats file, for matrices
    that the plan has none of. densities: by matrix. compared: rows of a comparison.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    known_from: str = ""
    alphas: Mapping[str, float] = field(default_factory=dict)
    densities: Mapping[str, Density] = field(default_factory=dict)
    compared: Sequence[ComparedRow] = ()
    stats_name: str | None = None


@dataclass(frozen=True)
class Content:
    """facts: what the template prints. data: what the script draws. missing: what could not be shown, and why."""

    facts: dict[str, Any]
    data: dict[str, Any]
    missing: list[str]


def packed(values: Any, kind: str) -> dict[str, str]:
    """A flat little-endian array for the page: kind is its numpy type, such as `u2` or `f4`."""
    array = np.ascontiguousarray(values, dtype=f"<{kind}")
    return {"type": kind, "base64": base64.b64encode(array.tobytes()).decode()}


def smallest(values: np.ndarray) -> str:
    """The narrowest unsigned type that holds all values."""
    largest = int(values.max(initial=0))
    return "u1" if largest < 1 << 8 else "u2" if largest < 1 << 16 else "u4"


def packed_names(names: Iterable[str]) -> dict[str, Any]:
    """Names as templates, in which # stands for a number, and those numbers. Undone by the page, and by a test."""
    templates: dict[str, int] = {}
    which: list[int] = []
    numbers: list[int] = []
    for name in names:
        # Only what reads back the same: no zeros in front, nothing beyond 32 bits; a # of the name's own is no number.
        found = [] if "#" in name else _NUMBER.findall(name)
        template = _NUMBER.sub("#", name) if found else name
        which.append(templates.setdefault(f"{len(found)} {template}", len(templates)))
        numbers += map(int, found)
    indices, values = np.array(which, np.int64), np.array(numbers, np.int64)
    return {
        "templates": [
            {"numbers": int(count), "text": text} for count, text in (key.split(" ", 1) for key in templates)
        ],
        "which": packed(indices, smallest(indices)),
        "numbers": packed(values, smallest(values)),
    }


def sampled(plan: Plan, limit: int = MAX_DENSITIES) -> list[str]:
    """Planned matrices whose spectra are to be kept: all, or evenly many with those of extreme α among them."""
    names = list(plan.assignment)
    if len(names) <= limit:
        return names
    by_alpha = sorted(plan.alpha, key=plan.alpha.__getitem__)
    ends = limit // 10
    extremes = [name for name in by_alpha[:ends] + by_alpha[len(by_alpha) - ends :] if name in plan.assignment]
    even = [names[at] for at in np.linspace(0, len(names) - 1, limit - len(extremes)).round().astype(int)]
    chosen = set(extremes) | set(even)
    return [name for name in names if name in chosen]


def content_of(run: Run, sources: Sources) -> Content:
    """Everything the page shows. Raises PlanError for a plan whose table contradicts its choices."""
    plan = run.plan
    names = list(plan.assignment)
    if not names:
        raise PlanError("The plan assigns no bits to any matrix (no assignment). Make it with `alphaq plan`.")
    missing: list[str] = []
    places = {name: sources.places.get(name) or place_by_name(name) for name in plan.choices}
    unknown = sum(name not in sources.places for name in plan.choices)
    if unknown:
        where = f" that {sources.known_from} does not have" if sources.known_from else ""
        missing.append(
            f"Layers, experts and roles of {unknown:,} matrices{where} are read from their names, and their sizes are "
            "unknown. Give --reference or --stats."
        )
    alphas = np.array([plan.alpha.get(name, sources.alphas.get(name, math.nan)) for name in names])
    if np.isnan(alphas).all():
        missing.append("No α: the plan's method did not measure it. Give --stats of `alphaq analyze`.")
    elif np.isnan(alphas).any():
        missing.append(f"α is undefined for {int(np.isnan(alphas).sum()):,} matrices; their cells are grey.")
    choices = sorted({*plan.choices.values(), *(plan.table.choices if plan.table else ())}, key=Choice.parse)
    column_of = {choice: column for column, choice in enumerate(choices)}
    errors = np.array([plan.expected_error.get(name, math.nan) for name in names])
    measured = np.array([run.measured.get(name, math.nan) for name in names])
    chosen = np.array([column_of[plan.choices[name]] for name in names])
    weights = [places[name].weights for name in names]
    maps, cells = _maps([places[name] for name in names])
    data: dict[str, Any] = {
        "choices": [{"name": choice, "bits": Choice.parse(choice).bits} for choice in choices],
        "names": packed_names(names),
        "maps": maps,
        "map": packed(cells[0], smallest(cells[0])),
        "row": packed(cells[1], smallest(cells[1])),
        "column": packed(cells[2], smallest(cells[2])),
        "alpha": packed(alphas, "f4"),
        "error": packed(errors, "f4"),
        "measured": packed(measured, "f4") if run.measured else None,
        "choice": packed(chosen, smallest(chosen)),
        "weights": None,
        "path": None,
        "densities": _densities(sources.densities, names),
        "compared": [row.model_dump() | {"label": row.label} for row in sources.compared if not row.error],
        "plan": {"size_bytes": plan.size_bytes, "average_bits": plan.average_bits, "method": plan.method},
    }
    if all(weights):
        known = np.array(weights, np.int64)
        data["weights"] = packed(known, smallest(known))
    path_facts: dict[str, Any] | None = None
    if plan.table is None:
        missing.append("No budget slider: the plan holds no table of losses. Make it again with `alphaq plan`.")
    else:
        data["path"], path_facts = _path(plan, names, column_of)
    if not sources.densities:
        missing.append("No eigenvalue densities: they need the weights. Give --reference MODEL, which was planned for.")
    elif len(sources.densities) < len(names):
        missing.append(
            f"Eigenvalue densities of {len(sources.densities):,} of {len(names):,} matrices, evenly spread with the "
            "extremes of α among them; --spectra sets how many."
        )
    if not run.measured:
        missing.append("No measured error: give the folder that `alphaq quantize` wrote instead of the plan alone.")
    if not sources.compared:
        missing.append("No other methods to compare with: give --compare FOLDER of `alphaq compare`.")
    failed = [f"{row.label} at {row.bits:g} bits: {row.error}" for row in sources.compared if row.error]
    missing += failed
    facts = {
        "name": plan.source.name if plan.source else run.name,
        "plan": plan,
        "check": check_words(plan.check) if plan.check else "",
        "matrices": len(names),
        "size": None if plan.size_bytes is None else human_bytes(plan.size_bytes),
        "gap": None if math.isnan(plan.gap) else plan.gap,
        "expected": _mean(errors),
        "measured": _mean(measured),
        "beside": _mean(errors[~np.isnan(measured)]),
        "outcome": _outcome(plan, sources.compared),
        "histogram": _histogram(plan, names),
        "correlation": _correlation(alphas, errors, data),
        "path": path_facts,
        "roles": _roles(plan, places),
        "compared": [row for row in sources.compared if not row.error],
        "texts": list(dict.fromkeys(text for row in sources.compared for text in row.perplexity or ())),
        "commands": reproduce(plan, run.options, Names(stats=sources.stats_name)),
        "unplanned": plan.unplanned,
        "neutral": plan.neutral,
    }
    return Content(facts, data, missing)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _histogram(plan: Plan, names: Sequence[str]) -> list[tuple[int, int, float]]:
    """Bits, matrices with them, and their share."""
    counts = Counter(plan.assignment[name] for name in names)
    return [(bits, count, count / len(names)) for bits, count in sorted(counts.items())]


def _outcome(plan: Plan, compared: Sequence[ComparedRow]) -> ComparedRow | None:
    """The compared row by this plan's method at this plan's size, within a thousandth.

    `compare` gives every method the same bytes, which come out a header entry away from those of a plan of its own.
    """
    size = plan.size_bytes
    near = [
        row
        for row in compared
        if not row.error and row.size_bytes and size and abs(row.size_bytes - size) <= SAME_SIZE * size
    ]
    own = [row for row in near if row.method == plan.method]
    return min(own, key=lambda row: abs((row.size_bytes or 0) - (size or 0)), default=None)


def _maps(places: Sequence[Place]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The heat maps' titles and labels, and for each matrix its map, row and column, int [3, matrices].

    Routed experts have a map for each projection, a column for each expert. What has no expert's number (dense MLPs,
    attention) is in one further map with a column for each projection.
    """
    keys = [place.projection if place.expert is not None else None for place in places]
    order = ("gate", "up", "down")
    titles = sorted(
        dict.fromkeys(keys),
        key=lambda key: (key is None, order.index(key) if key in order else len(order), key or ""),
    )
    cells = np.zeros((3, len(places)), np.int64)
    maps: list[dict[str, Any]] = []
    for number, title in enumerate(titles):
        members = [at for at, key in enumerate(keys) if key == title]
        rows = sorted({places[at].layer for at in members}, key=lambda layer: (layer is None, layer or 0))
        labels = [_column_label(places[at], title is None) for at in members]
        columns = sorted(set(labels), key=lambda label: (0, int(label), "") if label.isdigit() else (1, 0, label))
        row_of = {layer: row for row, layer in enumerate(rows)}
        column_of = {label: column for column, label in enumerate(columns)}
        taken: set[tuple[int, int]] = set()
        for at, label in zip(members, labels, strict=True):
            row, column = row_of[places[at].layer], column_of[label]
            while (row, column) in taken:  # two matrices that their names do not tell apart stand beside each other
                column = len(columns)
                columns.append(f"{label}′")
            taken.add((row, column))
            cells[:, at] = number, row, column
        maps.append(
            {
                "title": title if title is not None else "outside the routed experts",
                "rows": ["–" if layer is None else str(layer) for layer in rows],
                "columns": columns,
                "experts": title is not None,
            }
        )
    return maps, cells


def _column_label(place: Place, outside: bool) -> str:
    if not outside:
        return str(place.expert)
    return place.projection or place.role.value


def _path(plan: Plan, names: Sequence[str], column_of: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The slider's data, and what the page says of it."""
    table = plan.table
    assert table is not None  # the caller looks
    losses, costs = tables_of(table)
    allowed = losses[np.isfinite(losses)]
    totals = float(np.abs(allowed).sum()), float(costs.max(axis=1, initial=0).astype(float).sum())
    if not totals[0] < LARGEST_TOTAL or not totals[1] < 2**53:
        raise PlanError("The plan's losses or costs are beyond what a page can count with. Make it with `alphaq plan`.")
    empty = np.flatnonzero(~np.isfinite(losses).any(axis=1))
    units = list(table.losses)
    if len(empty):
        raise PlanError(f"The plan's table offers {units[empty[0]]!r} no choice. Make it again with `alphaq plan`.")
    unit_of = {member: number for number, unit in enumerate(units) for member in table.members.get(unit, (unit,))}
    if absent := [name for name in names if name not in unit_of]:
        raise PlanError(f"The plan's table lacks {absent[0]!r}. Make it again with `alphaq plan`.")
    owners = np.array([unit_of[name] for name in names])
    own = np.full(len(units), NO_MATRIX)
    for name, unit in zip(names, owners, strict=True):
        chosen = plan.choices[name]
        column = table.choices.index(chosen) if chosen in table.choices else NO_MATRIX
        if column == NO_MATRIX or not np.isfinite(losses[unit, column]) or own[unit] not in (NO_MATRIX, column):
            raise PlanError(
                f"The plan's table does not offer {name!r} its choice {chosen!r}, so the plan was edited since it was "
                "made. Make it again with `alphaq plan`."
            )
        own[unit] = column
    rows = np.arange(len(units))
    plan_cost, plan_loss = int(costs[rows, own].sum()), float(losses[rows, own].sum())
    path = budget_path(losses, costs)
    at = path.steps_within(plan_cost + (plan.budget_slack or 0.0))
    cost_of = np.array(table.cost_of, np.int64)
    columns = np.array([column_of[choice] for choice in table.choices])
    # Unit by unit, which spares a number of four bytes for every step; the page sorts them again by what they save.
    by_unit = np.argsort(path.units, kind="stable")
    climbs = np.bincount(path.units, minlength=len(units))
    data = {
        "unit": packed(owners, smallest(owners)),
        "columns": columns.tolist(),
        "start": packed(path.start, smallest(path.start)),
        "startLoss": packed(path.start_losses, "f4"),
        "startCost": path.start_cost,
        "finalLoss": path.final_loss,
        "climbs": packed(climbs, smallest(climbs)),
        "stepColumn": packed(path.columns[by_unit], smallest(path.columns)),
        "saved": packed(path.saved[by_unit], "f4"),
        "costOf": packed(cost_of, smallest(cost_of)),
        "costs": packed(np.array(table.costs, np.float64).ravel(), "f8"),
        "planColumn": packed(own, smallest(own)),
        "planCost": plan_cost,
        "planLoss": plan_loss,
        "slack": plan.budget_slack or 0.0,
        "unitOfCost": plan.cost_unit,
        "price": plan.price,
    }
    facts = {
        "steps": len(path),
        "units": len(units),
        "loss": float(path.losses[at]),
        "cost": int(path.costs[at]),
        "plan_cost": plan_cost,
        "plan_loss": plan_loss,
        "difference": float(path.losses[at] - plan_loss) / plan_loss if plan_loss else 0.0,
        "above": _above(path, plan_cost, plan_loss),
        "cost_unit": plan.cost_unit,
        "bound_by_more": plan.price is None or (plan.config is not None and plan.config.per_layer),
        "shared": len(units) != len(names),
    }
    return data, facts


def _above(path: BudgetPath, cost: int, loss: float) -> float | None:
    """How much of its bytes a plan could save at its own loss, as a share; None where it is on the path or below."""
    steps = int(np.searchsorted(-path.losses, -loss, side="left"))
    if steps >= len(path.costs) or path.costs[steps] >= cost:
        return None
    return 1 - float(path.costs[steps]) / cost


def _densities(densities: Mapping[str, Density], names: Sequence[str]) -> dict[str, Any] | None:
    kept = [(number, densities[name]) for number, name in enumerate(names) if name in densities]
    if not kept:
        return None
    numbers = np.array([number for number, _ in kept])
    found = [one for _, one in kept]
    counts = np.array([one.counts for one in found])
    return {
        "bins": counts.shape[1],
        "matrix": packed(numbers, smallest(numbers)),
        "counts": packed(counts.ravel(), smallest(counts)),
        "low": packed([one.low for one in found], "f4"),
        "high": packed([one.high for one in found], "f4"),
        "start": packed([one.start for one in found], "f4"),
        "alpha": packed([math.nan if one.alpha is None else one.alpha for one in found], "f4"),
        "tail": packed([one.tail_count for one in found], "u4"),
        "count": packed([one.count for one in found], "u4"),
    }


def _correlation(alphas: np.ndarray, errors: np.ndarray, data: dict[str, Any]) -> float | None:
    """Spearman's rank correlation of α with the error at the plan's choices; None where it is not defined."""
    known = ~np.isnan(alphas) & ~np.isnan(errors)
    if known.sum() < 3 or np.ptp(alphas[known]) == 0 or np.ptp(errors[known]) == 0:
        return None
    return float(spearmanr(alphas[known], errors[known]).statistic)


def _roles(plan: Plan, places: Mapping[str, Place]) -> dict[str, Any]:
    """Bits by role: weights at each width where sizes are known, else matrices. Largest role first."""
    sized = all(places[name].weights for name in plan.choices)
    totals: dict[str, Counter[int]] = {}
    for name in plan.choices:
        amount = (places[name].weights or 0) if sized else 1
        totals.setdefault(places[name].role.value, Counter())[plan.choice(name).bits] += amount
    rows = [
        {
            "role": role.replace("_", " "),
            "total": sum(counts.values()),
            "average": sum(bits * amount for bits, amount in counts.items()) / sum(counts.values()),
            "parts": [(bits, amount, amount / sum(counts.values())) for bits, amount in sorted(counts.items())],
        }
        for role, counts in sorted(totals.items(), key=lambda item: -sum(item[1].values()))
    ]
    return {"unit": "weights" if sized else "matrices", "rows": rows}
