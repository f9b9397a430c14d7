"""`alphaq report`: one HTML file about a plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaq.cli.means import JsonOption, Means, resources_for
from alphaq.cli.options import Shown
from alphaq.errors import AlphaQError
from alphaq.terminal import show

if TYPE_CHECKING:
    from alphaq.report.places import Place


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Plan file, or folder that `alphaq quantize` wrote.")],
    means: Annotated[Means, Shown(only=("revision", "workers"))],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    stats: Annotated[
        Path | None, typer.Option(help="CSV of `alphaq analyze`: places, sizes and α of the matrices.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Folder of `alphaq compare`: other methods, measured.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The original model that was planned for: places, sizes and spectra.")
    ] = None,
    spectra: Annotated[
        int | None,
        typer.Option(min=0, help="Matrices whose spectra are kept, with --reference; 2000 at most by default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a page about a plan: maps, a budget slider, spectra; one file that asks the network for nothing."""
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.report.content import MAX_DENSITIES, Sources
    from alphaq.report.densities import densities as measure_densities
    from alphaq.report.html import write_report
    from alphaq.report.places import places_of_matrices, read_places
    from alphaq.report.runs import read_comparison, read_run
    from alphaq.report.tables import human_bytes
    from alphaq.writing.planned import as_planned

    check_file(output)
    if reference is None and (spectra is not None or means.revision is not None):
        raise AlphaQError("--spectra and --revision apply only with --reference. Add --reference MODEL, or drop them.")
    reported = read_run(run)
    compared = [] if compare is None else read_comparison(compare)
    places: dict[str, Place] = {}
    alphas: dict[str, float] = {}
    names: list[str] = []
    if stats is not None:
        places, alphas = read_places(stats)
        names.append(stats.name)
    densities = {}
    if reference is not None:
        checkpoint = open_checkpoint(reference, means.revision, quantized=True)
        names.append(checkpoint.name)
        places |= places_of_matrices(as_planned(checkpoint, reported.plan).matrices)
        with resources_for(checkpoint, means.model_copy(update={"no_cache": True})) as resources:
            limit = MAX_DENSITIES if spectra is None else spectra
            densities = dict(measure_densities(as_planned(checkpoint, reported.plan), reported.plan, limit, resources))
    sources = Sources(places, " and ".join(names), alphas, densities, compared, None if stats is None else stats.name)
    with atomic_file(output) as unfinished:
        summary = write_report(unfinished, reported, sources)
    missing = "".join(f"\n  {line}" for line in summary.missing)
    show(
        as_json,
        {"output": str(output), **asdict(summary)},
        f"{output}: {human_bytes(summary.bytes)}, {summary.matrices:,} matrices; open it in a browser"
        + (f"\nnot shown:{missing}" if missing else ""),
    )
