"""`alphaq bench`: how fast this machine reads memory, and the engines that run here what they store."""

from __future__ import annotations

from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, cache_folder
from alphaq.terminal import progress, show


def bench(
    again: Annotated[bool, typer.Option("--again", help="Measure anew, though it is known.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine reads memory, and its engines each format; plans foretell speeds by it."""
    from alphaq.report.speeds import speeds_table
    from alphaq.trials.rates import all_rates_here

    found = all_rates_here(cache_folder(), again, progress)
    show(as_json, found.model_dump(), speeds_table(found), "Plans use it for --min-speed; --bandwidth states others.")
