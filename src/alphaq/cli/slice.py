"""`alphaq slice`: a smaller model out of one that is quantized already, without the original weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alphaq.cli.options import (
    JsonOption,
    build_plan,
    means_for,
    means_settings,
    note,
    plan_config,
    plan_settings,
    with_options,
)
from alphaq.terminal import err, progress, show


@with_options(
    frozenset({"stats", "imatrix", "calibration", "unweighted", "revision", "pre_tokenizer"}),
    settings=plan_settings,
    means=means_settings,
)
def slice_(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `alphaq quantize` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    settings: Any,
    means: Any,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Cut a quantized model down to a smaller budget: plans anew, takes the top bits of nested codes, writes."""
    fixed = {"stats": None, "imatrix": None, "calibration": None, "unweighted": False}
    settings = settings | fixed
    config = plan_config(settings)
    from alphaq.checkpoint.writer import check_absent
    from alphaq.engines.output import coded_with
    from alphaq.engines.profiles import profile
    from alphaq.report.tables import human_bytes, plan_table
    from alphaq.work.resources import Resources
    from alphaq.writing.artifact import known_alphas, nested_choices, open_artifact, own_pins
    from alphaq.writing.quantizing import quantize
    from alphaq.writing.records import WriteOptions

    check_absent(output)
    checkpoint, held = open_artifact(folder)
    if config.codec is None and config.engine == held.engine and coded_with(held) is not None:
        err.print("note: the slice is not coded; `alphaq recode` codes it", highlight=False)
    if config.engine == held.engine:  # what is outside the budget stays as it is
        settings["pin"] = [*own_pins(checkpoint, held, config.roles()), *(settings["pin"] or ())]
        settings["choices"] = settings["choices"] or (None if config.codec else nested_choices(checkpoint, held))
        config = plan_config(settings)
        settings["stats"] = known_alphas(checkpoint, held, config)
    with means_for(checkpoint, **means) as (pool, cache):
        made = build_plan(checkpoint, config, settings, pool, cache, means["device"])
        if cache is not None:
            cache.close()  # others may measure while this one writes
        told = WriteOptions(restart=restart, hash_contents=means["hash_contents"])
        result = quantize(checkpoint, made, output, told, Resources(pool, wrap=progress))
    note(result.notes)
    summary = (
        f"{output}: {human_bytes(result.size_bytes)} of weights, was {human_bytes(result.source_bytes)}; "
        f"{result.tensors} tensors re-read and correct\n{profile(made.engine).writer.usage.format(out=output)}"
    )
    show(as_json, made.model_dump(mode="json", exclude={"table"}) | result.as_json(), plan_table(made), summary)
