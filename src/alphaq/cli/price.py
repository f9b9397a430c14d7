"""`alphaq price`: what a model would cost, in bytes and in loss, before it is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from alphaq.cli.means import JsonOption, Means, ModelArgument, opened, resources_for
from alphaq.cli.options import Asked, Shown
from alphaq.cli.planning import note_unrouted
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.terminal import note, show, tell

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.measuring.resources import Resources
    from alphaq.measuring.rows import Extent
    from alphaq.planning import Request
    from alphaq.planning.pricing import Price

OFFERED = (
    *("share", "method", "choices", "fast", "group_size", "symmetric", "attention_bits", "shared_bits"),
    *("embedding_bits", "head_bits", "roles", "pins", "min_bits", "max_bits"),
)
PriceOptions: TypeAlias = Annotated[
    Asked[PlanConfig],
    Shown(
        only=OFFERED,
        defaults={"share": "1%"},
    ),
]
DEFAULT_ENGINE = "native"
PriceMeans: TypeAlias = Annotated[Means, Shown(only=("revision", "workers", "no_cache", "requantize"))]


def price(
    model: ModelArgument,
    asked: PriceOptions,
    means: PriceMeans,
    engine: Annotated[
        list[str] | None, typer.Option(help="Engine to price for, native by default; repeat. See `alphaq engines`.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file of what --json prints, for `alphaq plot curve`.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model would take and lose at every size, by a share of its bytes: before it is downloaded."""
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.planning import resolve
    from alphaq.report.curve import curve_lines, machine_marks
    from alphaq.report.prices import prices_curve, prices_table, unit_of

    if output is not None:
        check_file(output)
    configs = [
        asked.build(engine=name, budget=Budget(size_bytes=1)) for name in dict.fromkeys(engine or [DEFAULT_ENGINE])
    ]
    requests = [resolve(config) for config in configs]
    checkpoint = opened(model, means, headers_only=True)
    with resources_for(checkpoint, means) as resources:
        extent, found = _priced(checkpoint, requests, resources)
    machines, unit = machine_marks(), unit_of(requests[0].method, requests[0].config.method)
    curves = [prices_curve(f"{checkpoint.name}, {name}", some, machines, unit) for name, some in found.items()]
    told = {
        "model": checkpoint.name,
        "method": requests[0].config.method,
        "unit": unit,
        "read": asdict(extent),
        "engines": [_told(name, some) for name, some in found.items()],
        "curve": None if curves[0] is None else curves[0].model_dump(mode="json"),
    }
    if output is not None:
        with atomic_file(output) as unfinished:
            unfinished.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    parts = [
        part
        for (name, some), curve in zip(found.items(), curves, strict=True)
        for part in (prices_table(name, some, machines, unit), "" if curve is None else f"{curve_lines(curve)}\n")
    ]
    show(as_json, told, *parts)


def _priced(
    checkpoint: Checkpoint, requests: Sequence[Request], resources: Resources
) -> tuple[Extent, dict[str, list[Price]]]:
    """What is read, and prices by engine."""
    from alphaq.measuring.rows import draw_rows
    from alphaq.planning.fitting import least_bytes
    from alphaq.planning.pricing import prices
    from alphaq.planning.sampled import at_hand
    from alphaq.report.prices import extent_words

    requests = [one.with_stored(checkpoint) for one in requests]
    for one in requests:  # what an engine cannot store is told before anything is read
        least_bytes(checkpoint, one)
    with at_hand(checkpoint, resources) as (near, own):
        sample = draw_rows(near, requests[0].config.share or 1.0)
        extent = sample.extent
        tell(extent_words(extent))
        note(_scale(requests[0]))
        priced = {one.profile.name: prices(near, one, own) for one in requests}
    note_unrouted(next(iter(priced.values())).unrouted)
    return extent, {name: one.prices for name, one in priced.items()}


def _scale(request: Request) -> str:
    """What losses of a share of the bytes mean."""
    what = "those of a typical model" if request.method.joint else f"as method {request.config.method} counts errors"
    return (
        f"losses are in proportion only, {what}: the KL needs a pass through all weights, as `alphaq plan` without "
        "--share runs it"
    )


def _told(engine: str, found: Sequence[Price]) -> dict[str, object]:
    """The prices in one engine as JSON has them."""
    points = [
        {
            "size_bytes": one.plan.size_bytes,
            "bits_per_weight": one.plan.bits_per_weight,
            "lost": one.lost,
            "sampling_error": one.sampling_error,
        }
        for one in found
    ]
    return {"engine": engine, "points": points}
