"""`alphaq refine`: a plan improved by measured KL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaq.cli.inputs import Inputs
from alphaq.cli.means import JsonOption, Means, ModelArgument, RestartOption, opened, resources_for
from alphaq.cli.options import Asked, Shown
from alphaq.errors import AlphaQError
from alphaq.nouns.settings import PlanConfig
from alphaq.terminal import note, show, tell, warn

if TYPE_CHECKING:
    from alphaq.nouns.plan import Plan


def refine(
    model: ModelArgument,
    asked: Annotated[Asked[PlanConfig], Shown(only=("imatrix",))],
    means: Annotated[Means, Shown(only=("revision", "workers", "no_cache", "requantize", "pre_tokenizer"))],
    plan_file: Annotated[Path, typer.Option("--plan", help="Plan to improve, as `alphaq plan` writes it.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Plan file to write; an unfinished run for it is continued.")
    ],
    gradients: Annotated[int, typer.Option(min=8, help="Backward passes in each round.")] = 24,
    tokens: Annotated[
        int | None,
        typer.Option(min=256, help="Tokens of each; by default 1,024 to 4,096, the fewer the larger the model."),
    ] = None,
    by: Annotated[
        str, typer.Option(metavar="[gradients|groups]", help="What tells what exchanges do; groups needs no gradient.")
    ] = "gradients",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the model's own writing and of what is tried.")] = 0,
    restart: RestartOption = False,
    as_json: JsonOption = False,
) -> None:
    """Improve a plan by the KL that is measured on the model's own writing, at the same bytes; holds the model."""
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.nouns.plan import Plan
    from alphaq.report.tables import plan_table
    from alphaq.trials.refine import Refining, way
    from alphaq.trials.refine import refine as run

    check_file(output)
    if not plan_file.is_file():
        raise AlphaQError(
            f"No plan file {plan_file}. Make one with `alphaq plan MODEL --bits 2.5 -o {plan_file.name}`."
        )
    given = Plan.read(plan_file)
    inputs, by_way, state = Inputs.of(asked).of_plan(given), way(by), output.with_name(f"{output.name}.state")
    checkpoint = opened(model, means)
    with resources_for(checkpoint, means) as resources:
        bos = given.config is None or given.config.bos
        importance = inputs.made_for(checkpoint, resources, output.absolute().parent, bos).imatrix
        if resources.cache is not None:
            resources.cache.close()  # others may measure while this one runs the model
        refining = Refining(seed, gradients, tokens, by_way, importance, restart, tell)
        refined = run(checkpoint, given, refining, state, resources)
    _note(refined)
    with atomic_file(output) as partial:
        partial.write_text(refined.to_json(), encoding="utf-8")
    state.unlink()
    tell(f"Plan written to {output}")
    show(as_json, refined.model_dump(mode="json", exclude={"table"}), plan_table(refined))


def _note(plan: Plan) -> None:
    """Say what is not as a user would expect."""
    record = plan.refined
    assert record is not None  # of every plan that comes of it
    if not record.moved:
        warn("no exchange lowers the measured KL, so the given plan is written as it is")
    if record.hidden:
        note(f"{record.hidden} units keep their choices: the model's class stores them in an order of its own")
