"""`alphaq plot`: figures of publication quality, as PNG, SVG or PDF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alphaq.cli.options import JsonOption, RevisionOption, WorkersOption, means_for
from alphaq.terminal import progress, show

if TYPE_CHECKING:
    from alphaq.measuring.density import Density
    from alphaq.report.places import Place

KINDS = {
    "spectrum": "eigenvalue density with its fitted tail of two matrices; RUN is the model",
    "alpha": "α by layer, expert and projection; RUN is a stats CSV, a plan or a quantized folder",
    "bits": "bits by layer, expert and projection; RUN is a plan or a quantized folder",
    "methods": "KL or perplexity against bits for methods; RUN is a folder of `alphaq compare`, may be repeated",
    "gamma": "KL or perplexity against γ; RUN is a comparison of alphaq:gamma=0,alphaq:gamma=1,…; may be repeated",
}


def plot(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="; ".join(f"{name}: {what}" for name, what in KINDS.items()))
    ],
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="What the figure is of; depends on KIND.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write: .png, .svg or .pdf.")],
    matrix: Annotated[
        list[str] | None,
        typer.Option(help="spectrum: a matrix by name or pattern; repeat. The smallest and the largest α by default."),
    ] = None,
    metric: Annotated[str, typer.Option(help="methods, gamma: kl or perplexity.")] = "kl",
    bins: Annotated[int, typer.Option(min=8, max=512, help="spectrum: bins of the histogram.")] = 64,
    dpi: Annotated[int, typer.Option(min=30, max=1200, help="Dots per inch of a PNG.")] = 200,
    revision: RevisionOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a figure: spectrum, alpha, bits, methods or gamma (extra `plot`)."""
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.errors import AlphaQError
    from alphaq.registry import lookup, unknown
    from alphaq.report import plots
    from alphaq.report.runs import read_comparison, read_run

    lookup("kind of plot", KINDS, kind)
    plots.require_matplotlib()
    form = plots.check_format(output)
    check_file(output)
    if metric not in plots.METRICS:
        raise AlphaQError(unknown("--metric", metric, plots.METRICS))
    if kind not in ("methods", "gamma") and len(runs) > 1:
        raise AlphaQError(f"plot {kind} is of one run; got {len(runs)}. Draw one figure for each.")
    if matrix and kind != "spectrum":
        raise AlphaQError(f"--matrix is of plot spectrum, not of {kind}. Drop it.")
    summary: dict[str, Any] = {"kind": kind, "output": str(output)}
    if kind == "spectrum":
        densities = _densities(runs[0], matrix or [], bins, revision, workers)
        figure = plots.spectrum_figure(densities)
        summary["matrices"] = {name: one.alpha for name, one in densities}
    elif kind == "alpha":
        alphas, places = _alphas(Path(runs[0]))
        figure = plots.alpha_figure(alphas, places)
        summary["matrices"] = len(alphas)
    elif kind == "bits":
        plan = read_run(Path(runs[0])).plan
        figure = plots.bits_figure(plan.assignment, _places(plan.assignment))
        summary["matrices"] = len(plan.assignment)
    else:
        compared = [(Path(run).resolve().name, read_comparison(Path(run))) for run in runs]
        figure = (plots.methods_figure if kind == "methods" else plots.gamma_figure)(compared, metric)
        summary["runs"] = [name for name, _ in compared]
    with atomic_file(output) as unfinished:
        plots.save(figure, unfinished, form, dpi)
    show(as_json, summary, f"{output}: {kind}")


def _places(names: Any) -> dict[str, Place]:
    from alphaq.report.places import place_by_name

    return {name: place_by_name(name) for name in names}


def _alphas(path: Path) -> tuple[dict[str, float], dict[str, Place]]:
    """α of routed experts and their places, from a CSV, a plan, or a folder that holds one."""
    from alphaq.errors import AlphaQError
    from alphaq.nouns.matrix import Role
    from alphaq.report.places import read_places
    from alphaq.report.runs import read_run

    if path.suffix.lower() == ".csv":
        places, alphas = read_places(path)
        alphas = {name: alpha for name, alpha in alphas.items() if places[name].role is Role.EXPERT}
    else:
        alphas = read_run(path).plan.alpha
        places = _places(alphas)
    if not alphas:
        raise AlphaQError(f"{path} holds no α of an expert. Make a CSV with `alphaq analyze MODEL -o stats.csv`.")
    return alphas, places


def _densities(
    model: str, patterns: list[str], bins: int, revision: str | None, workers: int | None
) -> list[tuple[str, Density]]:
    """The matrices to draw with their densities, heaviest tail first."""
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.errors import AlphaQError
    from alphaq.measuring.density import DensityTask, density_one
    from alphaq.measuring.measurement import measure
    from alphaq.nouns.settings import names
    from alphaq.work.resources import Resources

    checkpoint = open_checkpoint(model, revision)
    with means_for(checkpoint, workers, no_cache=False) as (pool, cache):
        if patterns:
            chosen = []
            for pattern in patterns:
                found = [one for one in checkpoint.matrices if names(pattern, one.name)]
                if not found:
                    example = checkpoint.planned[0].name if checkpoint.planned else "none"
                    raise AlphaQError(f"No matrix matches {pattern!r}. Names look like {example!r}.")
                chosen += [one for one in found if one not in chosen]
            if len(chosen) > 6:
                raise AlphaQError(f"{len(chosen)} matrices match; a figure has room for 6. Give narrower --matrix.")
        else:
            planned = checkpoint.planned
            measured = progress(measure(checkpoint, planned, resources=Resources(pool, cache)), len(planned), "analyze")
            known = [
                (one.spectrum.alpha, matrix)
                for matrix, one in zip(planned, measured, strict=True)
                if one.spectrum is not None and one.spectrum.alpha is not None
            ]
            if not known:
                raise AlphaQError(f"No expert of {model} has an α. Name matrices with --matrix.")
            ends = min(known, key=lambda pair: pair[0]), max(known, key=lambda pair: pair[0])
            chosen = list(dict.fromkeys(matrix for _, matrix in ends))
        tasks = [DensityTask(one, bins=bins) for one in chosen]
        return [(one.name, found) for one, found in zip(chosen, pool.map(density_one, tasks), strict=True)]
