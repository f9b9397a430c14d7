"""`alphaq eval`: perplexity, and the distance from another model."""

from __future__ import annotations

from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, ModelArgument, SkipOption, note_folders
from alphaq.cli.options import Shown
from alphaq.nouns.scoring import Scoring
from alphaq.terminal import note, progress, show


def evaluate(
    model: ModelArgument,
    scoring: Annotated[Scoring, Shown(without=("skip_tokens",), required=("texts",), defaults={"dtype": "auto"})],
    reference: Annotated[str | None, typer.Option(help="Model to compare with: KL, top-1, acceptance rate.")] = None,
    skip_experts: SkipOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Perplexity per text with its interval; with --reference also KL, top-1 agreement and EAR."""
    from alphaq import pipeline
    from alphaq.evaluation.evaluate import fidelity_json
    from alphaq.evaluation.loading import settled, transformers_note
    from alphaq.report.tables import fidelity_table
    from alphaq.runtime.skipping import check_share

    check_share(skip_experts)
    note_folders(model, reference)
    scoring, why = settled(scoring, model, reference, "--skip-experts" if skip_experts else None)
    if said := transformers_note((model, reference), scoring):
        note(said)
    if why:
        note(why)
    fidelity = pipeline.evaluate(model, scoring, reference, progress, skip_experts)
    show(as_json, {"model": model, "skip_experts": skip_experts, **fidelity_json(fidelity)}, fidelity_table(fidelity))
