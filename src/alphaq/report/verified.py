"""What `verify` and `quantize` say about running an output in its engine."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from alphaq.engines.profiles import profile

if TYPE_CHECKING:
    from alphaq.evaluation.engine_run import EngineRun


def run_hint(engine: str, output: str, reference: str, plain: bool = False) -> str:
    """How to check that the engine computes what it should; nothing where that is not known.

    plain: whether the engine alone can run the model.
    """
    run = profile(engine).writer.run
    if run is None:
        return ""
    if plain:
        command = shlex.join(("alphaq", "eval", output, "--reference", reference, "--text", "my.txt"))
        return f"See what is lost on a text: {command}"
    command = shlex.join(("alphaq", "verify", output, "--reference", reference, "--run"))
    return f"See whether {run.called} computes what it should: {command}"


def run_line(ran: EngineRun | None, with_reference: bool) -> str:
    """What running it showed, or what was not checked."""
    if ran is None:
        left = "" if with_reference else "the original values (add --reference MODEL), nor "
        return f"Not checked: {left}what the engine computes with them (add --run)."
    agrees = f"to {ran.difference:.2g} standard deviations (correlation {ran.correlation:.4f})."
    if ran.twice:
        return f"{ran.engine}: logits of {ran.tokens} tokens are those of the restored weights in 16 bits, {agrees}"
    config = (
        "" if with_reference else " The config was the output's own; add --reference MODEL to go by the original's."
    )
    return f"{ran.engine}: logits of {ran.tokens} tokens are those of the restored weights, {agrees}{config}"
