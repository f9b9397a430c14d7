"""`alphaq slice`: a smaller model out of one that is quantized already, without the original weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaq.cli.inputs import Inputs
from alphaq.cli.means import JsonOption, Means, OutArgument, RestartOption, resources_for
from alphaq.cli.options import Asked, Shown
from alphaq.cli.planning import build_plan, plan_config
from alphaq.cli.quantize import show_quantized
from alphaq.nouns.settings import PlanConfig, Rule
from alphaq.terminal import note

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.nouns.plan import Plan


def slice_(
    folder: OutArgument,
    asked: Annotated[Asked[PlanConfig], Shown(without=("stats", "imatrix", "calibration", "unweighted", "roles"))],
    means: Annotated[Means, Shown(without=("revision", "pre_tokenizer", "converter", "requantize"))],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    restart: RestartOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut a quantized model down to a smaller budget: plans anew, takes the top bits of nested codes, writes."""
    inputs = Inputs()
    config = plan_config(asked, inputs)
    from alphaq import pipeline
    from alphaq.checkpoint.writer import check_absent
    from alphaq.engines.profiles import profile
    from alphaq.writing.artifact import check_cuttable, known_alphas, open_artifact

    check_absent(output)
    checkpoint, whole = open_artifact(folder)
    if config.engine == whole.engine:
        check_cuttable(folder, whole)
        if config.codec is None and whole.codec is not None:
            note("the slice is not coded; `alphaq recode` codes it")
        config = _as_it_is(config, checkpoint, whole)
        inputs = Inputs(stats=known_alphas(checkpoint, whole, config))
    with resources_for(checkpoint, means) as resources:
        plan = build_plan(checkpoint, config, inputs, resources).plan
        if resources.cache is not None:
            resources.cache.close()  # others may measure while this one writes
        options = pipeline.WriteOptions(restart=restart, hash_contents=means.hash_contents)
        result = pipeline.quantize(checkpoint, plan, output, options, resources)
    show_quantized(plan, result, profile(plan.engine).writer.used(str(output), result.files), as_json)


def _as_it_is(config: PlanConfig, checkpoint: Checkpoint, whole: Plan) -> PlanConfig:
    """The config with what is outside the budget left as the quantized model has it."""
    from alphaq.writing.artifact import nested_choices, own_pins

    pins = (Rule.parse(pin, "--pin") for pin in own_pins(checkpoint, whole, config.widths()))
    offered = config.choices or (None if config.codec else nested_choices(checkpoint, whole))
    return config.model_copy(update={"pins": (*pins, *config.pins), "choices": offered, "roles": "fixed"})
