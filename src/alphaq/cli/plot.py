"""`alphaq plot`: figures of publication quality, as PNG, SVG or PDF."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alphaq.cli.means import JsonOption, Means, resources_for
from alphaq.cli.options import Shown
from alphaq.errors import AlphaQError
from alphaq.registry import lookup, unknown
from alphaq.terminal import show

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.measuring.density import Density
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.matrix import MatrixRef
    from alphaq.report.curve import Curve
    from alphaq.report.places import Place

KINDS = {
    "spectrum": "eigenvalue density with its fitted tail of two matrices; RUN is the model",
    "alpha": "α by layer, expert and projection; RUN is a stats CSV, a plan or a quantized folder",
    "bits": "bits by layer, expert and projection; RUN is a plan or a quantized folder",
    "curve": "size against what is lost; RUN is what `alphaq fit -o` wrote, a plan or a quantized folder",
    "methods": "KL or perplexity against bits for methods; RUN is a folder of `alphaq compare`, may be repeated",
    "gamma": "KL or perplexity against γ; RUN is a comparison of alphaq:gamma=0,alphaq:gamma=1,…; may be repeated",
}
MOST_DRAWN = 6  # matrices that a figure has room for


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn."""

    kind: str
    runs: Sequence[str]
    patterns: Sequence[str]
    metric: str
    bins: int
    means: Means


def plot(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="; ".join(f"{name}: {what}" for name, what in KINDS.items()))
    ],
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="What to draw; depends on KIND.")],
    means: Annotated[Means, Shown(only=("revision", "workers"))],
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write: .png, .svg or .pdf.")],
    matrix: Annotated[
        list[str] | None,
        typer.Option(help="spectrum: a matrix by name or pattern; repeat. The smallest and the largest α by default."),
    ] = None,
    metric: Annotated[str, typer.Option(help="methods, gamma: kl or perplexity.")] = "kl",
    bins: Annotated[int, typer.Option(min=8, max=512, help="spectrum: bins of the histogram.")] = 64,
    dpi: Annotated[int, typer.Option(min=30, max=1200, help="Dots per inch of a PNG.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Draw a figure: spectrum, alpha, bits, curve, methods or gamma (extra `plot`)."""
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.report import plots

    lookup("kind of plot", KINDS, kind)
    plots.require_matplotlib()
    form = plots.check_format(output)
    check_file(output)
    if metric not in plots.METRICS:
        raise AlphaQError(unknown("--metric", metric, plots.METRICS))
    if kind not in ("methods", "gamma") and len(runs) > 1:
        raise AlphaQError(f"plot {kind} takes one run; got {len(runs)}. Draw one figure for each.")
    if matrix and kind != "spectrum":
        raise AlphaQError(f"--matrix applies only to plot spectrum, not to {kind}. Drop it.")
    figure, told = _drawn(Drawing(kind, runs, matrix or (), metric, bins, means))
    with atomic_file(output) as unfinished:
        plots.save(figure, unfinished, form, dpi)
    show(as_json, {"kind": kind, "output": str(output), **told}, f"{output}: {kind}")


def _drawn(drawing: Drawing) -> tuple[Any, dict[str, object]]:
    """matplotlib's figure, and what `--json` says of it."""
    from alphaq.report import plots
    from alphaq.report.runs import read_comparison, read_run

    kind, first = drawing.kind, drawing.runs[0]
    if kind == "spectrum":
        densities = _densities(drawing)
        return plots.spectrum_figure(densities), {"matrices": {name: one.alpha for name, one in densities}}
    if kind == "alpha":
        alphas, places = _alphas(Path(first))
        return plots.alpha_figure(alphas, places), {"matrices": len(alphas)}
    if kind == "bits":
        bits = read_run(Path(first)).plan.assignment
        return plots.bits_figure(bits, _places(bits)), {"matrices": len(bits)}
    if kind == "curve":
        curve = _curve(Path(first))
        return plots.curve_figure(curve), {
            "points": len(curve.points),
            "machines": [one.gib for one in curve.drawn_marks],
        }
    compared = [(Path(run).resolve().name, read_comparison(Path(run))) for run in drawing.runs]
    draw = plots.methods_figure if kind == "methods" else plots.gamma_figure
    return draw(compared, drawing.metric), {"runs": [name for name, _ in compared]}


def _curve(path: Path) -> Curve:
    """Of a fit as JSON, or of a plan; machines are marked by what the plan's memory keeps."""
    from alphaq.report.curve import curve_of_plan, marks_of_plan, read_curve
    from alphaq.report.runs import read_run

    if path.is_file() and _is_fit(path):
        return read_curve(path)
    plan = read_run(path).plan
    return curve_of_plan(plan, marks_of_plan(plan))


def _is_fit(path: Path) -> bool:
    """Whether a file is one of `alphaq fit -o`; what is no JSON is not."""
    from alphaq.work.untrusted import parse_json, read_bounded

    try:
        told = parse_json(read_bounded(path).decode("utf-8"), strict=True)
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and "curve" in told


def _places(names: Iterable[str]) -> dict[str, Place]:
    from alphaq.report.places import place_by_name

    return {name: place_by_name(name) for name in names}


def _alphas(path: Path) -> tuple[dict[str, float], dict[str, Place]]:
    """α of routed experts and their places, from a CSV, a plan, or a folder that holds one."""
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


def _densities(drawing: Drawing) -> list[tuple[str, Density]]:
    """The matrices to draw with their densities, heaviest tail first."""
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.measuring.density import DensityTask, density_one

    checkpoint = open_checkpoint(drawing.runs[0], drawing.means.revision)
    with resources_for(checkpoint, drawing.means) as resources:
        chosen = _named(checkpoint, drawing.patterns) if drawing.patterns else _ends(checkpoint, resources)
        tasks = [DensityTask(one, bins=drawing.bins) for one in chosen]
        densities = resources.pool(checkpoint).map(density_one, tasks)
        return [(one.name, density) for one, density in zip(chosen, densities, strict=True)]


def _named(checkpoint: Checkpoint, patterns: Sequence[str]) -> list[MatrixRef]:
    """Matrices that the patterns name. Raises AlphaQError for none, or too many."""
    from alphaq.nouns.settings import names

    chosen: dict[MatrixRef, None] = {}
    for pattern in patterns:
        matching = [one for one in checkpoint.matrices if names(pattern, one.name)]
        if not matching:
            example = checkpoint.planned[0].name if checkpoint.planned else "none"
            raise AlphaQError(f"No matrix matches {pattern!r}. Names look like {example!r}.")
        chosen |= dict.fromkeys(matching)
    if len(chosen) > MOST_DRAWN:
        raise AlphaQError(f"{len(chosen)} matrices match; a figure has room for {MOST_DRAWN}. Give narrower --matrix.")
    return list(chosen)


def _ends(checkpoint: Checkpoint, resources: Resources) -> list[MatrixRef]:
    """The matrices with the smallest and the largest α. Raises AlphaQError if none has any."""
    from alphaq.measuring.measurement import measure

    planned = checkpoint.planned
    results = measure(checkpoint, planned, resources=resources)
    known = [
        (one.spectrum.alpha, matrix)
        for matrix, one in zip(planned, resources.wrap(results, len(planned), "analyze"), strict=True)
        if one.spectrum is not None and one.spectrum.alpha is not None
    ]
    if not known:
        raise AlphaQError(f"No expert of {checkpoint.name} has an α. Name matrices with --matrix.")
    ends = min(known, key=lambda pair: pair[0]), max(known, key=lambda pair: pair[0])
    return list(dict.fromkeys(matrix for _, matrix in ends))
