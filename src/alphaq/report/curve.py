"""Size against what is lost: the curve that a memory picks a point of, with marks for usual machines.

Of a plan it is every plan that some price makes best (report/path.py); of `alphaq fit` it is the plans that were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alphaq.errors import PlanError
from alphaq.nouns.plan import Plan, first_fault
from alphaq.planning.fitting import MACHINES_GIB, of_machine
from alphaq.report.path import budget_path, tables_of
from alphaq.report.tables import human_bytes
from alphaq.work.untrusted import parse_json, read_bounded

WIDTH, HEIGHT = 72, 14
POINTS = 400


class CurvePoint(BaseModel):
    """Size of the weight files, and what is lost there: KL in nats per token, or the method's own loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int = Field(gt=0)
    lost: float = Field(gt=0, allow_inf_nan=False)


class Mark(BaseModel):
    """A machine, and the bytes that it leaves for weight files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gib: float = Field(gt=0)
    weights_bytes: int


class Curve(BaseModel):
    """Points from small to large. unit: what is lost, in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    unit: str
    points: tuple[CurvePoint, ...] = Field(min_length=1)
    marks: tuple[Mark, ...] = ()

    @property
    def drawn_marks(self) -> tuple[Mark, ...]:
        """Those inside the curve."""
        low, high = self.points[0].size_bytes, self.points[-1].size_bytes
        return tuple(mark for mark in self.marks if low <= mark.weights_bytes <= high)


def machine_marks(kept: int = 0) -> list[Mark]:
    """Usual machines. kept: bytes that an engine keeps there beside the weights."""
    return [Mark(gib=gib, weights_bytes=of_machine(gib) - kept) for gib in MACHINES_GIB]


def marks_of_plan(plan: Plan) -> list[Mark]:
    """The same for a plan, where it was made for a memory with what its engine keeps."""
    return machine_marks(0 if plan.memory is None else plan.memory.kept.total)


@dataclass(frozen=True)
class _Scale:
    """A logarithmic axis of so many places."""

    low: float
    high: float
    places: int

    def place(self, value: float) -> int:
        span = math.log(self.high / self.low) or 1.0
        return min(self.places - 1, max(0, round((self.places - 1) * math.log(value / self.low) / span)))


def curve_of_plan(plan: Plan, marks: Sequence[Mark] = ()) -> Curve:
    """The curve of a plan's own table. Raises PlanError without one, or of a budget that is not counted in bytes."""
    if plan.table is None or plan.size_bytes is None or plan.cost_unit != "bytes":
        raise PlanError("The plan has no table of losses in bytes, so there is no curve. Plan again from the model.")
    losses, costs = tables_of(plan.table)
    path = budget_path(losses, costs)
    columns = {name: number for number, name in enumerate(plan.table.choices)}
    members = plan.table.members
    chosen = [columns[plan.choices[(members.get(unit) or (unit,))[0]]] for unit in plan.table.losses]
    rest = plan.size_bytes - int(costs[np.arange(len(costs)), chosen].sum())
    steps = np.unique(np.linspace(0, len(path), POINTS).astype(int))
    points = [
        CurvePoint(size_bytes=int(path.costs[step]) + rest, lost=float(path.losses[step]))
        for step in steps
        if path.losses[step] > 0
    ]
    if not points:
        raise PlanError("Nothing is lost anywhere on the plan's curve, so there is none to draw.")
    name = "" if plan.source is None else plan.source.name
    return Curve(model=name, unit="expected loss (objective)", points=tuple(points), marks=tuple(marks))


def read_curve(path: Path) -> Curve:
    """The curve of a file that `alphaq fit -o` wrote. Raises PlanError."""
    try:
        told = parse_json(read_bounded(path).decode("utf-8"), strict=True)
        return Curve.model_validate(told.get("curve") if isinstance(told, dict) else None)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}. Write it with `alphaq fit MODEL -o`.") from None
    except (ValueError, ValidationError) as error:
        raise PlanError(f"{path} holds no curve of `alphaq fit -o`: {first_fault(error)}.") from None


def curve_lines(curve: Curve) -> str:
    """The curve in characters: what is lost upwards, size to the right, both by ratios; machines below."""
    sizes, lost = ([getattr(one, name) for one in curve.points] for name in ("size_bytes", "lost"))
    across, up = _Scale(sizes[0], sizes[-1], WIDTH), _Scale(min(lost), max(lost), HEIGHT)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    marks = {across.place(mark.weights_bytes): f"{mark.gib:g}" for mark in curve.drawn_marks}
    for column in marks:
        for row in grid:
            row[column] = "┊"
    places = [(across.place(size), HEIGHT - 1 - up.place(loss)) for size, loss in zip(sizes, lost, strict=True)]
    for (left, first), (right, last) in pairwise(places):
        for column in range(left, right + 1):
            share = (column - left) / max(1, right - left)
            grid[round(first + share * (last - first))][column] = "·"
    for column, height in places if len(places) <= WIDTH // 2 else places[:: max(1, len(places) // 12)]:
        grid[height][column] = "●"
    names = [" "] * (WIDTH + 4)
    for column, name in marks.items():
        names[column : column + len(name)] = name
    labels = [f"{max(lost):.3g}", *[""] * (HEIGHT - 2), f"{min(lost):.3g}"]
    lines = [f"{label:>9} │{''.join(row)}" for label, row in zip(labels, grid, strict=True)]
    ends = human_bytes(sizes[0]), human_bytes(sizes[-1])
    axis = f"{'':>9} └{'─' * WIDTH}\n{'':>11}{ends[0]}{ends[1]:>{WIDTH - len(ends[0])}}"
    machines = f"\n{'machine':>9}  {''.join(names).rstrip()} GiB" if marks else ""
    return "\n".join([f"{curve.unit} against size of the weight files", *lines, axis]) + machines
