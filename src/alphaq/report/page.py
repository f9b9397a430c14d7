"""What the page is made of: facts that the template prints, and data that its script draws.

Names of the data's fields are those that the script reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alphaq.nouns.plan import Plan
from alphaq.report.arrays import PackedArray, PackedNames
from alphaq.report.curve import Mark
from alphaq.report.runs import ComparedRow
from alphaq.report.slider import PathFacts, SliderData


@dataclass(frozen=True)
class HeatMap:
    """A heat map's title and labels; experts: whether columns are routed experts."""

    title: str
    rows: list[str]
    columns: list[str]
    experts: bool


@dataclass(frozen=True)
class DensityData:
    """Densities of some matrices, by their number. counts: [matrices, bins]. start, tail: of the fitted tail."""

    bins: int
    matrix: PackedArray
    counts: PackedArray
    low: PackedArray
    high: PackedArray
    start: PackedArray
    alpha: PackedArray
    tail: PackedArray
    count: PackedArray


@dataclass(frozen=True)
class NamedChoice:
    """A choice as the page names it.

    bits: per weight of its codes, 2.25 of t2.25.
    """

    name: str
    bits: float


@dataclass(frozen=True)
class PlanFigures:
    """What the script needs to know of the plan itself."""

    size_bytes: int | None
    average_bits: float | None
    method: str | None


@dataclass(frozen=True)
class PageData:
    """What the script draws. map, row, column: the cell of each matrix. choice: the number of each matrix's choice."""

    choices: list[NamedChoice]
    names: PackedNames
    maps: list[HeatMap]
    map: PackedArray
    row: PackedArray
    column: PackedArray
    alpha: PackedArray
    error: PackedArray
    measured: PackedArray | None
    choice: PackedArray
    weights: PackedArray | None
    path: SliderData | None
    densities: DensityData | None
    compared: list[ComparedRow]
    plan: PlanFigures
    machines: list[Mark]


@dataclass(frozen=True)
class RoleBits:
    """parts: bits, the amount at them, and its share."""

    role: str
    total: int
    average: float
    parts: list[tuple[float, int, float]]


@dataclass(frozen=True)
class Roles:
    """Bits by role; unit: of what is counted, weights or matrices."""

    unit: str
    rows: list[RoleBits]


@dataclass(frozen=True)
class Facts:
    """What the template prints. expected, measured: mean errors; beside: the expected one of what was measured."""

    name: str
    plan: Plan
    check: str
    refined: str
    dropped: str
    predicted: str
    matrices: int
    size: str | None
    gap: float | None
    expected: float | None
    measured: float | None
    beside: float | None
    outcome: ComparedRow | None
    histogram: list[tuple[float, int, float]]
    correlation: float | None
    path: PathFacts | None
    roles: Roles
    compared: list[ComparedRow]
    texts: list[str]
    commands: list[tuple[str, str]]
    unplanned: Mapping[str, str]
    neutral: Mapping[str, str]


@dataclass(frozen=True)
class Content:
    """facts: what the template prints. data: what the script draws. missing: what could not be shown, and why."""

    facts: Facts
    data: PageData
    missing: list[str]
