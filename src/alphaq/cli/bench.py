"""`alphaq bench`: how fast this machine reads memory."""

from __future__ import annotations

from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, cache_folder
from alphaq.terminal import show


def bench(
    again: Annotated[bool, typer.Option("--again", help="Measure anew, though it is known.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine reads memory, which bounds tokens per second; plans use it."""
    from alphaq.measuring.bandwidth import bandwidth_here

    found = bandwidth_here(cache_folder(), again)
    rate = f"{found.bytes_per_second / 1e9:.1f} GB/s on {found.threads} threads"
    show(
        as_json,
        found.model_dump(),
        f"{found.machine}: {rate}\nPlans use it for --min-speed; state another with --bandwidth.",
    )
