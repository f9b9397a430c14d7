"""What the page shows, as plain values and compact arrays: the functional part of a report, no file written.

A model may have 70 000 matrices with 24 choices each. Names are kept as templates and numbers; the budget path as one
column and one float32 per step; densities as 16-bit counts of a sample of the matrices. All of it becomes
base64 in one JSON document.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import spearmanr

from alphaq.errors import PlanError
from alphaq.formats.table import code_bits, parse_choice
from alphaq.measuring.density import Density
from alphaq.nouns.plan import Plan
from alphaq.report.arrays import packed, packed_counts, packed_names
from alphaq.report.commands import Names, reproduce
from alphaq.report.curve import marks_of_plan
from alphaq.report.page import Content, DensityData, Facts, HeatMap, NamedChoice, PageData, PlanFigures, RoleBits, Roles
from alphaq.report.places import Place, place_by_name
from alphaq.report.runs import ComparedRow, Run
from alphaq.report.slider import PathFacts, SliderData, slider_of
from alphaq.report.tables import check_words, dropped_words, human_bytes, predicted_words, refined_words

MAX_DENSITIES = 2000
"""Matrices whose spectra are kept at most, of those sampled: 2000 take 0.3 MB, and an eigenvalue solver minutes."""
SAME_SIZE = 1e-3


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


@dataclass(frozen=True)
class _Figures:
    """Of each planned matrix, NaN where it is not known: α, expected and measured error, float64 [matrices]."""

    names: list[str]
    alphas: np.ndarray
    errors: np.ndarray
    measured: np.ndarray

    @classmethod
    def of(cls, run: Run, sources: Sources) -> _Figures:
        plan, names = run.plan, list(run.plan.assignment)
        return cls(
            names,
            np.array([plan.alpha.get(name, sources.alphas.get(name, math.nan)) for name in names]),
            np.array([plan.expected_error.get(name, math.nan) for name in names]),
            np.array([run.measured.get(name, math.nan) for name in names]),
        )


def content_of(run: Run, sources: Sources) -> Content:
    """Everything the page shows. Raises PlanError for a plan whose table contradicts its choices."""
    plan = run.plan
    if not plan.assignment:
        raise PlanError("The plan assigns no bits to any matrix (no assignment). Make it with `alphaq plan`.")
    places = {name: sources.places.get(name) or place_by_name(name) for name in plan.choices}
    figures = _Figures.of(run, sources)
    choices = sorted({*plan.choices.values(), *(plan.table.choices if plan.table else ())}, key=parse_choice)
    column_of = {choice: column for column, choice in enumerate(choices)}
    slider = path = None
    if plan.table is not None:
        slider, path = slider_of(plan, plan.table, figures.names, column_of)
    return Content(
        _facts(run, sources, figures, places, path),
        _data(run, sources, figures, places, column_of, slider),
        list(_missing(run, sources, figures)),
    )


def _data(
    run: Run,
    sources: Sources,
    figures: _Figures,
    places: Mapping[str, Place],
    column_of: Mapping[str, int],
    slider: SliderData | None,
) -> PageData:
    plan, names = run.plan, figures.names
    maps, cells = _maps([places[name] for name in names])
    weights = [places[name].weights for name in names]
    return PageData(
        choices=[NamedChoice(choice, code_bits(parse_choice(choice))) for choice in column_of],
        names=packed_names(names),
        maps=maps,
        map=packed_counts(cells[0]),
        row=packed_counts(cells[1]),
        column=packed_counts(cells[2]),
        alpha=packed(figures.alphas, "f4"),
        error=packed(figures.errors, "f4"),
        measured=packed(figures.measured, "f4") if run.measured else None,
        choice=packed_counts(np.array([column_of[plan.choices[name]] for name in names])),
        weights=packed_counts(np.array(weights, np.int64)) if all(weights) else None,
        path=slider,
        densities=_densities(sources.densities, names),
        compared=[row for row in sources.compared if not row.error],
        plan=PlanFigures(plan.size_bytes, plan.average_bits, plan.method),
        machines=marks_of_plan(plan),
    )


def _facts(run: Run, sources: Sources, figures: _Figures, places: Mapping[str, Place], path: PathFacts | None) -> Facts:
    plan, errors, measured = run.plan, figures.errors, figures.measured
    return Facts(
        name=plan.source.name if plan.source else run.name,
        plan=plan,
        check=check_words(plan.check) if plan.check else "",
        refined=refined_words(plan.refined) if plan.refined else "",
        dropped=dropped_words(plan.dropped) if plan.dropped else "",
        predicted=predicted_words(plan.prediction) if plan.prediction else "",
        matrices=len(figures.names),
        size=None if plan.size_bytes is None else human_bytes(plan.size_bytes),
        gap=None if math.isnan(plan.gap) else plan.gap,
        expected=_mean(errors),
        measured=_mean(measured),
        beside=_mean(errors[~np.isnan(measured)]),
        outcome=_outcome(plan, sources.compared),
        histogram=_histogram(plan, figures.names),
        correlation=_correlation(figures.alphas, errors),
        path=path,
        roles=_roles(plan, places),
        compared=[row for row in sources.compared if not row.error],
        texts=list(dict.fromkeys(text for row in sources.compared for text in row.perplexity or ())),
        commands=reproduce(plan, run.options, Names(stats=sources.stats_name)),
        unplanned=plan.unplanned,
        neutral=plan.neutral,
    )


def _missing(run: Run, sources: Sources, figures: _Figures) -> Iterator[str]:
    """What the page cannot show, why, and what would help."""
    unknown = sum(name not in sources.places for name in run.plan.choices)
    if unknown:
        where = f" that {sources.known_from} does not have" if sources.known_from else ""
        yield (
            f"Layers, experts and roles of {unknown:,} matrices{where} are read from their names, and their sizes are "
            "unknown. Give --reference or --stats."
        )
    undefined = np.isnan(figures.alphas)
    if undefined.all():
        yield "No α: the plan's method did not measure it. Give --stats of `alphaq analyze`."
    elif undefined.any():
        yield f"α is undefined for {int(undefined.sum()):,} matrices; their cells are grey."
    if run.plan.table is None:
        yield "No budget slider: the plan holds no table of losses. Make it again with `alphaq plan`."
    if not sources.densities:
        yield "No eigenvalue densities: they need the weights. Give --reference MODEL, and no --spectra 0."
    elif len(sources.densities) < len(figures.names):
        yield (
            f"Eigenvalue densities of {len(sources.densities):,} of {len(figures.names):,} matrices, evenly spread "
            "with the extremes of α among them; --spectra sets how many."
        )
    if not run.measured:
        yield "No measured error: give the folder that `alphaq quantize` wrote instead of the plan alone."
    if not sources.compared:
        yield "No other methods to compare with: give --compare FOLDER of `alphaq compare`."
    yield from (f"{row.label} at {row.bits:g} bits: {row.error}" for row in sources.compared if row.error)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _histogram(plan: Plan, names: Sequence[str]) -> list[tuple[float, int, float]]:
    """Bits, matrices with them, and their share."""
    counts = Counter(code_bits(plan.choice(name)) for name in names)
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


def _maps(places: Sequence[Place]) -> tuple[list[HeatMap], np.ndarray]:
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
    maps: list[HeatMap] = []
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
            HeatMap(
                title=title if title is not None else "outside the routed experts",
                rows=["–" if layer is None else str(layer) for layer in rows],
                columns=columns,
                experts=title is not None,
            )
        )
    return maps, cells


def _column_label(place: Place, outside: bool) -> str:
    if not outside:
        return str(place.expert)
    return place.projection or place.role.value


def _densities(densities: Mapping[str, Density], names: Sequence[str]) -> DensityData | None:
    numbers = np.array([number for number, name in enumerate(names) if name in densities])
    if not len(numbers):
        return None
    own = [densities[names[number]] for number in numbers]
    counts = np.array([one.counts for one in own])
    return DensityData(
        bins=counts.shape[1],
        matrix=packed_counts(numbers),
        counts=packed_counts(counts.ravel()),
        low=packed([one.low for one in own], "f4"),
        high=packed([one.high for one in own], "f4"),
        start=packed([one.start for one in own], "f4"),
        alpha=packed([math.nan if one.alpha is None else one.alpha for one in own], "f4"),
        tail=packed([one.tail_count for one in own], "u4"),
        count=packed([one.count for one in own], "u4"),
    )


def _correlation(alphas: np.ndarray, errors: np.ndarray) -> float | None:
    """Spearman's rank correlation of α with the error at the plan's choices; None where it is not defined."""
    known = ~np.isnan(alphas) & ~np.isnan(errors)
    if known.sum() < 3 or np.ptp(alphas[known]) == 0 or np.ptp(errors[known]) == 0:
        return None
    return float(spearmanr(alphas[known], errors[known]).statistic)


def _roles(plan: Plan, places: Mapping[str, Place]) -> Roles:
    """Bits by role: weights at each width where sizes are known, else matrices. Largest role first."""
    sized = all(places[name].weights for name in plan.choices)
    totals: dict[str, Counter[float]] = {}
    for name in plan.choices:
        amount = (places[name].weights or 0) if sized else 1
        totals.setdefault(places[name].role.value, Counter())[code_bits(plan.choice(name))] += amount
    rows = [
        RoleBits(
            role.replace("_", " "),
            total=sum(counts.values()),
            average=sum(bits * amount for bits, amount in counts.items()) / sum(counts.values()),
            parts=[(bits, amount, amount / sum(counts.values())) for bits, amount in sorted(counts.items())],
        )
        for role, counts in sorted(totals.items(), key=lambda item: -sum(item[1].values()))
    ]
    return Roles("weights" if sized else "matrices", rows)
