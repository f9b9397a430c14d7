"""`alphaq prune`: a model with fewer experts, in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaq.cli.means import JsonOption, Means, ModelArgument, RestartOption, opened, resources_for
from alphaq.cli.options import Shown
from alphaq.terminal import show, warn

if TYPE_CHECKING:
    from alphaq.writing.pruning import PruneResult


def prune(
    model: ModelArgument,
    experts: Annotated[int, typer.Option(min=1, help="How many experts each layer is to keep.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    means: Annotated[Means, Shown(only=("revision", "workers", "no_cache", "hash_contents"))],
    restart: RestartOption = False,
    bos: Annotated[bool, typer.Option(help="Begin each window with what the tokenizer puts before a text.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Drop the experts of each layer that the model misses least, by its own writing; nothing is quantized."""
    from alphaq.checkpoint.writer import check_absent
    from alphaq.planning.dropping import measured_drops, to_drop
    from alphaq.writing.pruning import Pruning
    from alphaq.writing.pruning import prune as write

    check_absent(output)
    checkpoint = opened(model, means)
    with resources_for(checkpoint, means) as resources:
        drops = measured_drops(checkpoint, bos, resources)
        counts = drops.evenly(to_drop(checkpoint, drops, experts))
        if resources.cache is not None:
            resources.cache.close()
        wanted = Pruning(drops.first(counts), drops.bound(counts), restart)
        result = write(checkpoint, wanted, output, resources)
    _show(result, as_json)


def _show(result: PruneResult, as_json: bool) -> None:
    from alphaq.report.tables import human_bytes

    assert result.bound is not None  # it was measured
    if result.bound > 0.1:
        warn(
            f"what is gone costs up to {result.bound:.2g} nats per token by itself: much more than quantizing to 4 "
            "bits. Evaluate the model on your own tasks before you use it."
        )
    gone = sum(map(len, result.dropped.values()))
    show(
        as_json,
        result.model_dump(mode="json"),
        f"{result.out}: {human_bytes(result.size_bytes)}, was {human_bytes(result.source_bytes)}; {gone} experts gone, "
        f"{result.experts} left in each layer; they cost up to {result.bound:.2g} nats per token",
    )
