"""`alphaq explain`: why matrices got their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alphaq.cli.means import JsonOption
from alphaq.errors import AlphaQError
from alphaq.nouns.plan import Plan
from alphaq.terminal import show


def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, or folder that holds plan.json.")],
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Matrices to explain, e.g. 'layers.0.*down_proj'.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Units to show at most.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Why matrices got their bits: loss at each choice, gain per byte against the price, what would move them."""
    from alphaq.report.explanation import explain_plan, explanation_tables

    path = plan_file / "plan.json" if plan_file.is_dir() else plan_file
    if not path.is_file():
        raise AlphaQError(f"No plan file {path}. Make one with `alphaq plan MODEL --bits 2.5 -o {path.name}`.")
    explained = explain_plan(Plan.read(path), pattern, limit)
    show(as_json, explained, *explanation_tables(explained))
