"""`alphaq certify`: put on record how faithful a model is to its original."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel, ConfigDict, Field

from alphaq.cli.means import JsonOption, ModelArgument, note_folders
from alphaq.cli.options import Shown
from alphaq.errors import AlphaQError
from alphaq.nouns.option import Option
from alphaq.nouns.scoring import Scoring
from alphaq.terminal import note, progress, show, tell, warn

if TYPE_CHECKING:
    from alphaq.evaluation.tasks import TaskRequest

TASKS = "Tasks (with --tasks)"


class TaskOptions(BaseModel):
    """What lm-eval is to run."""

    model_config = ConfigDict(frozen=True)

    tasks: Annotated[
        str | None, Option("Tasks of lm-eval, or YAML files of your own, comma-separated (alphaq[eval]).", TASKS)
    ] = None
    include_path: Annotated[Path | None, Option("Folder of your own task files.", TASKS)] = None
    limit: Annotated[int | None, Option("Documents of each task; all by default.", TASKS)] = Field(default=None, ge=2)
    few_shot: Annotated[
        int | None, Option("Examples in the prompt; by default the task's own number.", TASKS, name="num_fewshot")
    ] = Field(default=None, ge=0)
    batch_size: Annotated[int, Option("Requests at a time.", TASKS)] = Field(default=1, ge=1)


def certify(
    command: typer.Context,
    model: ModelArgument,
    reference: Annotated[str, typer.Option(help="The original model: folder, hub id or GGUF file.")],
    scoring: Annotated[Scoring, Shown(required=("texts",))],
    tasks: TaskOptions,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; certificate.json beside the model by default.")
    ] = None,
    ear: Annotated[
        float, typer.Option(min=0, max=1, help="EAR that the verdict asks for; 0.99 is distribution-lossless.")
    ] = 0.99,
    as_json: JsonOption = False,
) -> None:
    """Measure how faithful a model is to its original, with intervals and verdicts, and write certificate.json."""
    if tasks.tasks is None and tasks != TaskOptions():
        raise AlphaQError(
            "--include-path, --limit, --num-fewshot and --batch-size apply only with --tasks. Add it, or drop them."
        )
    from alphaq import pipeline
    from alphaq.checkpoint.writer import check_file
    from alphaq.evaluation.certificate import other_source
    from alphaq.evaluation.room import with_stream
    from alphaq.report.tables import certificate_tables

    target = output or _beside(model)
    check_file(target)
    request = _request(tasks)
    note_folders(model, reference)
    scoring, why = with_stream(scoring, [model, reference])
    if why:
        note(why)
    made = pipeline.certify(model, reference, scoring, ear, request, _command(command), progress)
    made.write(target)
    if other := other_source(made.model, made.reference):
        warn(other)
    tell(f"Certificate written to {target}")
    show(as_json, made.model_dump(mode="json"), *certificate_tables(made))


def _beside(model: str) -> Path:
    """certificate.json beside a model. Raises AlphaQError for one that is not on this machine."""
    from alphaq.nouns.fidelity import CERTIFICATE_NAME

    place = Path(model).expanduser()
    if not place.exists():
        raise AlphaQError(
            f"{model} is not a folder or file of this machine. Say where the certificate goes with -o FILE."
        )
    return (place if place.is_dir() else place.parent) / CERTIFICATE_NAME


def _request(asked: TaskOptions) -> TaskRequest | None:
    from alphaq.evaluation.tasks import TaskRequest

    if asked.tasks is None:
        return None
    return TaskRequest.of(
        asked.tasks,
        include_path=asked.include_path,
        limit=asked.limit,
        few_shot=asked.few_shot,
        batch_size=asked.batch_size,
    )


def _command(context: typer.Context) -> str:
    """The command as it was typed; what a terminal would obey is replaced, since certificates with it are refused."""
    typed = shlex.join(["alphaq", *(context.find_root().obj or ())])
    return "".join(char if char.isprintable() else "\ufffd" for char in typed)
