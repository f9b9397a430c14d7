"""`alphaq price`: what a model would cost, in bytes and in loss, before it is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from alphaq.cli.means import JsonOption, Means, ModelArgument, opened, resources_for
from alphaq.cli.options import Asked, Shown
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
    from alphaq.report.prices import prices_curve, prices_table

    if output is not None:
        check_file(output)
    configs = [
        asked.build(engine=name, budget=Budget(size_bytes=1)) for name in dict.fromkeys(engine or [DEFAULT_ENGINE])
    ]
    requests = [resolve(config) for config in configs]
    checkpoint = opened(model, means, headers_only=True)
    with resources_for(checkpoint, means) as resources:
        extent, found = _priced(checkpoint, requests, resources)
    machines = machine_marks()
    curves = [prices_curve(f"{checkpoint.name}, {name}", some, machines) for name, some in found.items()]
    told = {
        "model": checkpoint.name,
        "method": requests[0].config.method,
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
        for part in (prices_table(name, some, machines), "" if curve is None else f"{curve_lines(curve)}\n")
    ]
    show(as_json, told, *parts)


def _priced(
    checkpoint: Checkpoint, requests: Sequence[Request], resources: Resources
) -> tuple[Extent, dict[str, list[Price]]]:
    """What is read, and prices by engine."""
    from alphaq.measuring.rows import draw_rows
    from alphaq.planning.fitting import least_bytes
    from alphaq.planning.pricing import prices
    from alphaq.planning.sampled import at_hand, fetch_rows
    from alphaq.report.prices import extent_words

    requests = [one.with_stored(checkpoint) for one in requests]
    for one in requests:  # what an engine cannot store is told before anything is read
        least_bytes(checkpoint, one)
    with at_hand(checkpoint, resources) as (near, own):
        sample = draw_rows(near, requests[0].config.share or 1.0)
        extent = sample.extent
        tell(extent_words(extent))
        note(*_unknown(near, requests[0]))
        fetch_rows(sample, own)
        found = {one.profile.name: prices(near, one, own) for one in requests}
    return extent, found


def _unknown(checkpoint: Checkpoint, request: Request) -> Iterator[str]:
    """What a share of the bytes cannot say."""
    yield (
        "losses are in proportion only, those of a typical model: the KL needs a pass through all weights, as "
        "`alphaq plan` without --share runs it"
    )
    if "prior" in request.method.needs and not checkpoint.architecture.router_norm:
        yield "how often experts are used needs a pass too in this family, so all count alike"


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
