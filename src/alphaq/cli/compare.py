"""`alphaq compare`: methods side by side at the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaq.cli.inputs import Inputs, Sight, rounding_of, text_of
from alphaq.cli.means import JsonOption, Means, ModelArgument, opened, resources_for
from alphaq.cli.options import Asked, Shown
from alphaq.cli.planning import plan_config
from alphaq.cli.quantize import TokensOption
from alphaq.errors import AlphaQError, BudgetError
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.terminal import note, show, tell, warn

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.writing.rounding import Rounding

FIXED = ("bits", "bpw", "size_bytes", "engine", "method", "stats", "unweighted", "imatrix", "codec")
"""Settings of a plan that are the same for all, or given otherwise."""


def compare(
    model: ModelArgument,
    asked: Annotated[Asked[PlanConfig], Shown(without=(*FIXED, "bos"))],
    means: Annotated[Means, Shown(without=("device", "pre_tokenizer", "converter", "requantize"))],
    scoring: Annotated[Scoring, Shown(required=("texts",))],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results; an unfinished run there is continued.")
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, comma-separated, or all (see `alphaq methods`); also with settings: alphaq:gamma=2."
        ),
    ] = "uniform,random,first-layers,structure,distortion,alphaq,paper,auto",
    quantizers: Annotated[
        str | None,
        typer.Option(help="Quantizers, comma-separated (see `alphaq quantizers`); the usual one by default."),
    ] = None,
    calibration_tokens: TokensOption = None,
    bits: Annotated[str, typer.Option(help="Budgets: bits per expert weight, comma-separated.")] = "2,2.5,3,3.5",
    as_json: JsonOption = False,
) -> None:
    """Compare methods at the same bytes: perplexity, KL, EAR, top-1, with paired confidence intervals."""
    calibration = asked.values["calibration"]
    names, budgets = _methods(methods, calibration), _budgets(bits)
    if not names or not budgets:
        raise AlphaQError("Nothing to compare. Give --methods and --bits, for example --bits 2,2.5.")
    config = plan_config(asked, Inputs(), budget=Budget.of(bits=min(budgets)))
    config = config.model_copy(update={"bos": scoring.bos})
    checkpoint = opened(model, means)
    if checkpoint.store is not None:
        raise AlphaQError("compare runs the model, whose weights must lie on a local disk. Download it first.")

    from alphaq.sensitivity.methods import method
    from alphaq.trials.compare import Comparison, as_begun
    from alphaq.trials.compare import compare as run
    from alphaq.trials.tables import comparison_table
    from alphaq.trials.trial import settled

    on_text = any(method(name.partition(":")[0]).needs_text for name in names)
    roundings = _roundings(checkpoint, _listed(quantizers or ""), Sight(calibration, calibration_tokens, scoring.bos))
    if calibration is not None and not on_text and not any(one.by_inputs for one in roundings):
        raise AlphaQError("--calibration does nothing for these methods and quantizers. Drop it.")
    text = text_of(calibration, scoring.bos) if on_text else None
    scoring, why = settled(as_begun(scoring, output), checkpoint, max(budgets))
    if why:
        note(why)
    with resources_for(checkpoint, means) as resources:
        rows = run(checkpoint, Comparison(names, budgets, config, text, roundings), scoring, output, resources)
    warn(*(f"{row.method} at {row.bits:g} bits: {row.error}" for row in rows if row.error))
    show(as_json, rows, comparison_table(rows))
    tell(f"Results in {output}")


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _methods(text: str, calibration: str | None) -> list[str]:
    """Methods as they were named. Raises UnknownNameError."""
    from alphaq.sensitivity.methods import METHODS, method

    if text == "all":
        return [name for name, one in METHODS.items() if calibration is not None or not one.needs_text]
    names = _listed(text)
    for name in names:
        method(name.partition(":")[0])
    return names


def _budgets(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BudgetError(f"--bits {text!r} is not a list of numbers. Write for example --bits 2,2.5,3.") from None


def _roundings(checkpoint: Checkpoint, names: list[str], sight: Sight) -> list[Rounding]:
    """Of each quantizer; those that look at inputs look at the text."""
    from alphaq.quantizers.base import looks_at_inputs

    if sight.tokens is not None and not any(map(looks_at_inputs, names)):
        raise AlphaQError("--calibration-tokens applies only to quantizers gptq and learned. Drop it.")
    return [rounding_of(checkpoint, "native", name, sight if looks_at_inputs(name) else Sight()) for name in names]
