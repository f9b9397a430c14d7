"""`alphaq bench`: how fast this machine reads memory, and the engines that run here what they store."""

from __future__ import annotations

from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, cache_folder
from alphaq.cli.planning import warn_doubtful
from alphaq.terminal import note, progress, show


def bench(
    again: Annotated[bool, typer.Option("--again", help="Measure anew, though it is known.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine reads memory, and its engines each format; plans foretell speeds by it."""
    from alphaq.report.speeds import speeds_table
    from alphaq.trials.rates import all_rates_here

    here, found = all_rates_here(cache_folder(), again, progress)
    for engine, measured in found.items():
        warn_doubtful(engine, measured)
        if measured.missing:
            note(f"{engine} is left out: {measured.missing}")
    show(as_json, here.model_dump(), speeds_table(here), "Plans use it for --min-speed; --bandwidth states others.")
