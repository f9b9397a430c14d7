"""A plan and a spread of α as a terminal can show them: a cell for each layer and expert, a bar for each bin.

A model without experts has one map instead, a row for each projection and a cell for each layer.

A cell's height is its bits (▁ is 1, █ is 8), and colour repeats it; without colour, or where a terminal knows only
ASCII, a digit says it. What does not fit is pooled: a cell then stands for the mean of several experts or layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.text import Text

from alphaq.nouns.plan import Plan
from alphaq.report.places import Place, place_by_name

BLOCKS = "▁▂▃▄▅▆▇█"
COLOURS = ("#8a5fa8", "#5f6ec4", "#3b8fb5", "#21a585", "#6ccd5a", "#b5de2b", "#fde725", "#fff4b0", "#ffffff")
MAX_ROWS = 32
MIN_COLUMNS = 8
_ORDER = ("gate", "up", "gate_up", "down", "q", "k", "v", "o")
BAR_WIDTH = 40
HISTOGRAM_BINS = 12


@dataclass(frozen=True)
class _Maps:
    """What is drawn: tables of bits side by side, NaN where there is none, and what their rows and cells are."""

    title: str
    labels: tuple[str, ...]
    tables: Mapping[str, np.ndarray]
    row: str = "layers"
    cell: str = "experts"


def bit_map(plan: Plan, console: Console, places: Mapping[str, Place] | None = None) -> Text:
    """Maps of the planned experts, a projection beside the other, as wide as the console; of layers without experts."""
    maps = _maps(plan, places or {})
    if not maps.tables:
        return Text()
    symbols, tables = _symbols(console), maps.tables
    label = max(map(len, maps.labels)) + 2
    per_row = max(1, min(len(tables), (console.width - label + 2) // (MIN_COLUMNS + 2)))
    room = (console.width - label) // per_row - 2
    rows = _pools(len(maps.labels), MAX_ROWS)
    found = Text(no_wrap=True)
    found.append(maps.title, "bold")
    titles = list(tables)
    pooled = 1
    for first in range(0, len(titles), per_row):
        part = titles[first : first + per_row]
        shrunk = {title: _pooled(tables[title], rows, _pools(tables[title].shape[1], room)) for title in part}
        pooled = max([pooled, *(math.ceil(tables[title].shape[1] / shrunk[title].shape[1]) for title in part)])
        head = "".join(f"{title[: shrunk[title].shape[1]]:<{shrunk[title].shape[1] + 2}}" for title in part)
        found.append(f"\n{'':{label}}{head.rstrip()}\n" if head.strip() else "\n")
        for row, members in enumerate(rows):
            found.append(f"{maps.labels[members[0]]:>{label - 2}}  ")
            for title in part:
                for value in shrunk[title][row]:
                    found.append(*_cell(value, symbols))
                found.append("  ")
            found.right_crop(2)
            found.append("\n")
    found.append(f"{'':{label}}")
    notes = []
    if symbols == BLOCKS:
        for bits, words in _legend(plan.assignment.values()).items():
            found.append(*_cell(bits, symbols))
            found.append(f" {words}  ")
    else:
        rounded = " to the nearest whole" if any(bits % 1 for bits in plan.assignment.values()) else ""
        notes.append(f"a digit is bits{rounded}{', F is 16' if 16 in plan.assignment.values() else ''}")
    if pooled > 1:
        notes.append(f"a cell is the mean of up to {pooled} {maps.cell}")
    if len(rows) < len(maps.labels):
        notes.append(f"a row of up to {math.ceil(len(maps.labels) / len(rows))} {maps.row}")
    found.append("; ".join(notes))
    found.rstrip()
    return found


def _legend(used: Iterable[float]) -> dict[int, str]:
    """Which bits each cell of a plan stands for."""
    of_cell: dict[int, set[float]] = {}
    for bits in used:
        of_cell.setdefault(max(1, round(bits)), set()).add(bits)
    words = {}
    for cell, members in sorted(of_cell.items()):
        low, high = min(members), max(members)
        words[cell] = f"{low:g} to {high:g} bits" if low < high else f"{low:g} bit{'s' if low > 1 else ''}"
    return words


def _maps(plan: Plan, places: Mapping[str, Place]) -> _Maps:
    """The maps of a plan; no tables where numbers are those that no model has."""
    places_of = {name: places.get(name) or place_by_name(name) for name in plan.assignment}
    layered = {name: place for name, place in places_of.items() if place.layer is not None}
    experts = {name: place for name, place in layered.items() if place.expert is not None}
    shown = experts or layered
    layers = sorted({place.layer for place in shown.values() if place.layer is not None})
    width = 1 + max((place.expert or 0 for place in experts.values()), default=0)
    if len(layers) * width > 16 * max(1, len(shown)):
        return _Maps("", (), {})
    index = {layer: number for number, layer in enumerate(layers)}
    titles = sorted({_short(place) for place in shown.values()}, key=lambda one: (_rank(one), one))
    # [projections, layers, experts], of which a model without experts has one.
    bits = np.full((len(titles), len(layers), width), np.nan)
    for name, place in shown.items():
        bits[titles.index(_short(place)), index[place.layer or 0], place.expert or 0] = plan.assignment[name]
    if not experts:
        tables = {"": bits[:, :, 0]} if titles else {}
        return _Maps("Bits by projection (down) and layer (across)", tuple(titles), tables, "projections", "layers")
    by_projection = dict(zip(titles, bits, strict=True))
    return _Maps("Bits by layer (down) and expert (across)", tuple(map(str, layers)), by_projection)


def _short(place: Place) -> str:
    return place.projection.removesuffix("_proj")


def _rank(projection: str) -> int:
    return _ORDER.index(projection) if projection in _ORDER else len(_ORDER)


def _pools(count: int, room: int) -> list[list[int]]:
    """At most `room` groups of neighbours, as even as can be."""
    groups = np.array_split(np.arange(count), min(count, max(1, room)))
    return [group.tolist() for group in groups]


def _pooled(table: np.ndarray, rows: Sequence[Sequence[int]], columns: Sequence[Sequence[int]]) -> np.ndarray:
    """Means over groups of rows and of columns; NaN where a group has no value."""
    known = ~np.isnan(table)
    values = np.where(known, table, 0.0)
    starts = [group[0] for group in rows], [group[0] for group in columns]
    totals, counts = (
        np.add.reduceat(np.add.reduceat(part, starts[0], axis=0), starts[1], axis=1)
        for part in (values, known.astype(float))
    )
    return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)


def _symbols(console: Console) -> str:
    """What stands for 1 to 8 bits: blocks in colour, digits without, since neighbouring blocks look much alike."""
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    return BLOCKS if coloured and console.encoding.lower().startswith("utf") else "12345678"


def _cell(value: float, symbols: str) -> tuple[str, str]:
    if math.isnan(value):
        return " ", ""
    bits = max(1, round(value))
    if bits > len(symbols):  # 16: kept
        return ("█" if symbols == BLOCKS else "F"), COLOURS[-1]
    return symbols[bits - 1], COLOURS[bits - 1]


def alpha_histogram(alphas: Sequence[float], console: Console) -> Text:
    """Bars of how many matrices have which α. Empty for less than two different values."""
    values = np.asarray(alphas, float)
    if len(values) < 2 or not np.ptp(values) > 0:
        return Text()
    counts, edges = np.histogram(values, HISTOGRAM_BINS)
    ascii_only = not console.encoding.lower().startswith("utf")
    width = max(8, min(BAR_WIDTH, console.width - 30))
    found = Text(no_wrap=True)
    found.append("α of all matrices" if not ascii_only else "alpha of all matrices", "bold")
    for count, low, high in zip(counts.tolist(), edges, edges[1:], strict=False):
        length = width * count / counts.max()
        bar = "#" * round(length) if ascii_only else "█" * int(length) + ("", *"▏▎▍▌▋▊▉")[int(8 * (length % 1))]
        if count and not bar:
            bar = "." if ascii_only else "▏"
        found.append(f"\n{low:8.3f} - {high:.3f}  ")
        found.append(bar, "#3b8fb5")
        found.append(f" {count:,}" if count else " 0")
    found.append("\nsmall α: heavy tail" if not ascii_only else "\nsmall alpha: heavy tail")
    return found
