"""`alphaq demo`: the whole story on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alphaq.cli.means import JsonOption
from alphaq.terminal import progress, show


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")] = Path(
        "alphaq-demo"
    ),
    as_json: JsonOption = False,
) -> None:
    """The whole story on the bundled model: plan, quantize, evaluate, report."""
    from alphaq import pipeline
    from alphaq.trials.tables import demo_table

    result = pipeline.demo(output, progress)
    show(
        as_json,
        result.as_json(),
        demo_table(result.rows),
        f'Report: {result.report}\nModel:  {result.model}  (try: alphaq generate {result.model} "def main")',
    )
