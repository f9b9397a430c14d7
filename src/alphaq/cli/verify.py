"""`alphaq verify`: whether files on disk are what their plan promises."""

from __future__ import annotations

from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, Means, OutArgument, resources_for
from alphaq.cli.options import Shown
from alphaq.terminal import note, show


def verify(
    output: OutArgument,
    means: Annotated[Means, Shown(only=("workers",))],
    reference: Annotated[str | None, typer.Option(help="The original model, to compare values too.")] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Also run a few tokens in the engine, beside the restored weights.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Re-read every tensor against the plan, the checksums and (with --reference) the original values."""
    from dataclasses import asdict

    from alphaq import pipeline
    from alphaq.report.verified import run_line
    from alphaq.writing.artifact import open_source

    original = None if reference is None else open_source(reference)
    note(*(() if original is None else original.notes))
    with resources_for(original, means.model_copy(update={"no_cache": True})) as resources:
        result = pipeline.verify(output, original, resources)
    ran = pipeline.verify_run(output, original) if run else None
    beside = ""
    if (expected := result.mean_relative_error_expected) is not None:
        beside = f"; of planned matrices {result.mean_relative_error_planned:.4g}, expected {expected:.4g}"
    show(
        as_json,
        {"ok": True, **result.model_dump(), "run": None if ran is None else asdict(ran)},
        f"{output}: all {result.tensors} tensors are as planned ({result.quantized} quantized, "
        f"mean relative error {result.mean_relative_error:.4g}{beside})",
        run_line(ran, original is not None),
    )
