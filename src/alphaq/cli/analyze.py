"""`alphaq analyze`: the spectrum of every matrix, into a CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, Means, ModelArgument, opened, resources_for
from alphaq.cli.options import Asked, Shown
from alphaq.nouns.settings import PlanConfig
from alphaq.terminal import show


def analyze(
    model: ModelArgument,
    means: Annotated[Means, Shown(without=("converter",))],
    asked: Annotated[Asked[PlanConfig], Shown(only=("spectrum", "tail"))],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV to write.")] = Path("stats.csv"),
    as_json: JsonOption = False,
) -> None:
    """Measure every matrix's weight spectrum and write one CSV row each."""
    from alphaq import pipeline
    from alphaq.checkpoint.writer import check_file
    from alphaq.report.bitmap import alpha_histogram
    from alphaq.spectra.variants import SpectrumVariant

    variant = SpectrumVariant(asked.parsed("spectrum"), asked.parsed("tail"))
    check_file(output)
    checkpoint = opened(model, means)
    with resources_for(checkpoint, means) as resources:
        rows = pipeline.analyze(checkpoint, output, variant, resources)
    alphas = sorted(spectrum.alpha for _, spectrum in rows if spectrum.alpha is not None)
    middle = alphas[len(alphas) // 2] if alphas else None
    summary = {
        "model": checkpoint.name,
        "output": str(output),
        "matrices": len(rows),
        "alpha_undefined": len(rows) - len(alphas),
        "alpha_min": alphas[0] if alphas else None,
        "alpha_median": middle,
        "alpha_max": alphas[-1] if alphas else None,
    }
    spread = f"α {alphas[0]:.3f} – {alphas[-1]:.3f}, median {middle:.3f}" if alphas else "no α defined"
    told = f"{len(rows)} matrices measured into {output}: {spread}"
    show(as_json, summary, told, lambda console: alpha_histogram(alphas, console))
