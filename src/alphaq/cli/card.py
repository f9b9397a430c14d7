"""`alphaq card`: a Hugging Face model card of an output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, OutArgument
from alphaq.terminal import note, show, tell


def card(
    folder: OutArgument,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File to write, - for stdout; README.md in OUT by default.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the original, such as Qwen/Qwen3-30B-A3B, if the folder does not name it."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder of the original model, for its card and licence where OUT has none (GGUF)."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate to quote; certificate.json in OUT by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that was edited since.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a Hugging Face model card: plan, sizes, certificate, commands; the original's card is kept below."""
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.report.card import README_NAME, make_card

    target = folder / README_NAME if output is None else None if output == "-" else Path(output)
    if target is not None:
        check_file(target)
    made = make_card(folder, target, base_model, reference, certificate, force)
    note(*made.notes)
    if target is not None:
        with atomic_file(target) as partial:
            partial.write_text(made.text, encoding="utf-8")
        tell(f"Card written to {target}")
    if as_json:
        show(True, {"output": None if target is None else str(target), "metadata": made.metadata, "card": made.text})
    elif target is None:
        sys.stdout.write(made.text)
