"""`alphaq skip`: what leaving out experts costs and gains."""

from __future__ import annotations

from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, ModelArgument, note_folders
from alphaq.cli.options import Shown
from alphaq.errors import AlphaQError
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.skipping import Decoding
from alphaq.terminal import progress, show

SHARES = "0.1,0.2,0.3,0.4,0.5,0.6,0.8,1"


def skip(
    model: ModelArgument,
    scoring: Annotated[Scoring, Shown(without=("stream",), required=("texts",), defaults={"dtype": "auto"})],
    decoding: Decoding,
    shares: Annotated[str, typer.Option(help="Values of --skip-experts to try, between commas; 0 is added.")] = SHARES,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with; by default the same with all of its experts.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Speed, KL and top-1 of a native checkpoint by --skip-experts: which threshold is worth it."""
    from alphaq import pipeline
    from alphaq.report.tables import skip_table

    wanted = _parsed(shares)
    note_folders(model, reference)
    curve = pipeline.skip_curve(model, scoring, wanted, reference, decoding, progress)
    show(as_json, {"model": model, **vars(curve)}, skip_table(curve))


def _parsed(shares: str) -> list[float]:
    try:
        return [float(one) for one in shares.split(",")]
    except ValueError:
        raise AlphaQError(f"--shares {shares} is no list of numbers. Try --shares 0.2,0.4,0.6.") from None
