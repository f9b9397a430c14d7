"""`alphaq plan`: bits for every matrix under a budget."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaq.cli.converting import opened_for
from alphaq.cli.inputs import Inputs
from alphaq.cli.means import JsonOption, Means, opened, resources_for
from alphaq.cli.memory import ServingOptions, fitted, plan_within, serving_of
from alphaq.cli.options import Asked
from alphaq.cli.planning import build_plan, note_pace, plan_config
from alphaq.cli.search import ANY_BUDGET, ScoringOptions, Search, WantedOptions, search_plan
from alphaq.errors import AlphaQError, BudgetError
from alphaq.nouns.plan import Plan
from alphaq.nouns.serving import Serving
from alphaq.nouns.settings import PlanConfig
from alphaq.terminal import show, tell

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint


def plan(
    asked: Asked[PlanConfig],
    wanted: WantedOptions,
    scoring: ScoringOptions,
    serving: ServingOptions,
    means: Means,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plan file to write.")] = None,
    write_type_file: Annotated[
        Path | None,
        typer.Option(help="Also write the types for `llama-quantize --tensor-type-file` (engine llama.cpp)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check budget and engine by shapes; reads and fetches headers alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose bits for every expert matrix under a budget; shows the plan, and writes it with -o."""
    search, inputs = Search.of(wanted, scoring, asked, means), Inputs.of(asked)
    host = serving_of(serving, asked, search is not None)
    config = plan_config(asked, inputs, model is not None, None if search is None and host is None else ANY_BUDGET)
    from alphaq.checkpoint.writer import check_file

    for file in (output, write_type_file, wanted.values["curve"]):
        if file is not None:
            check_file(file)
    _require_model(config, model, search or host, write_type_file)
    if dry_run:
        if model is None or search is not None or any((output, write_type_file, means.converter, config.imatrix)):
            raise AlphaQError(
                "--dry-run needs MODEL and makes no plan. Drop --output, --write-type-file, --converter, --imatrix and "
                "--ear."
            )
        headers = opened(model, means, headers_only=True)
        _show_outline(headers, fitted(headers, config, host)[0], as_json)
        return
    beside = output or (search.wanted.curve if search is not None else None)
    scratch = None if beside is None else beside.absolute().parent
    few, folder = config.share is not None, scratch or Path()
    with nullcontext() if model is None else opened_for(config.engine, model, means, folder, few) as checkpoint:
        with resources_for(checkpoint, means) as resources:
            inputs = inputs.made_for(checkpoint, resources, scratch or Path(), config.bos)
            if search is None or checkpoint is None:

                def build(config: PlanConfig, inputs: Inputs = inputs) -> Plan:
                    return build_plan(checkpoint, config, inputs, resources).plan

                made = build(config) if checkpoint is None else plan_within(checkpoint, config, host, build)
            else:
                made = search_plan(checkpoint, config, inputs, search, resources, scratch=scratch)
            if checkpoint is not None and not few:  # which would read more of it
                note_pace(checkpoint, made, resources)
        if write_type_file is not None and checkpoint is not None:
            _write_types(write_type_file, checkpoint, made)
    if output is not None:
        _write(output, made.to_json())
        tell(f"Plan written to {output}")
    _show_plan(made, checkpoint, as_json)


def _require_model(
    config: PlanConfig, model: str | None, runs: Search | Serving | None, write_type_file: Path | None
) -> None:
    """Raise AlphaQError for options that need the model, or another engine."""
    from alphaq.engines.profiles import profile

    if write_type_file is not None and (model is None or profile(config.engine).writer.type_file is None):
        raise AlphaQError("--write-type-file is for llama.cpp and needs the model. Add MODEL and --engine llama.cpp.")
    if runs is not None and model is None:
        raise BudgetError(f"--{'ear runs' if isinstance(runs, Search) else 'memory looks at'} the model. Give MODEL.")


def _write_types(path: Path, checkpoint: Checkpoint, made: Plan) -> None:
    from alphaq.engines.profiles import profile
    from alphaq.writing.planned import as_planned

    type_file = profile(made.engine).writer.type_file
    assert type_file is not None  # checked before
    _write(path, type_file(as_planned(checkpoint, made), made.every_choice()))
    tell(f"Types written to {path}")


def _write(path: Path, text: str) -> None:
    from alphaq.checkpoint.writer import atomic_file

    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _show_outline(checkpoint: Checkpoint, config: PlanConfig, as_json: bool) -> None:
    """What shapes alone say of a plan."""
    from dataclasses import asdict

    from alphaq import planning
    from alphaq.planning.outline import outline
    from alphaq.report.tables import outline_table

    made = outline(checkpoint, planning.resolve(config).with_stored(checkpoint))
    show(as_json, asdict(made), outline_table(made))


def _show_plan(made: Plan, checkpoint: Checkpoint | None, as_json: bool) -> None:
    from alphaq.report.bitmap import bit_map
    from alphaq.report.places import places_of_matrices
    from alphaq.report.tables import plan_table
    from alphaq.writing.planned import as_planned

    places = None if checkpoint is None else places_of_matrices(as_planned(checkpoint, made).matrices)
    told = made.model_dump(mode="json", exclude={"table"})
    show(as_json, told, plan_table(made), lambda console: bit_map(made, console, places))
