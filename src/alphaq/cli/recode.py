"""`alphaq recode`: entropy-code a native checkpoint's tensors, or decode them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, Means, OutArgument
from alphaq.cli.options import Shown
from alphaq.errors import AlphaQError
from alphaq.formats.versions import CODECS
from alphaq.registry import unknown
from alphaq.terminal import progress, show


def recode(
    folder: OutArgument,
    means: Annotated[Means, Shown(only=("workers",))],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    codec: Annotated[str, typer.Option(help="zstd, or none to decode.")] = CODECS[-1],
    as_json: JsonOption = False,
) -> None:
    """Make a native checkpoint smaller on disk, or plain again: the same weights to the bit."""
    if codec not in CODECS:
        raise AlphaQError(unknown("--codec", codec, CODECS))
    from alphaq.measuring.resources import Resources
    from alphaq.report.tables import human_bytes
    from alphaq.work.workers import Workers, sensible_count
    from alphaq.writing import recoding

    if not folder.is_dir():
        raise AlphaQError(f"No folder {folder}. Point to the output of `alphaq quantize`.")
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with Workers(means.workers or sensible_count(nbytes), None) as pool:
        result = recoding.recode(folder, output, codec, Resources(pool, wrap=progress))
    share = result.size_bytes / result.source_bytes
    show(
        as_json,
        result.model_dump(),
        f"{output}: {human_bytes(result.size_bytes)} of weights, was {human_bytes(result.source_bytes)} "
        f"({share:.3f}); {result.tensors} tensors re-read and correct",
    )
