"""Commands that put on record how good a model is, and say so to others: `certify` and `card`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from alphaq.cli.options import (
    BosOption,
    JsonOption,
    ModelArgument,
    MoreTextsArgument,
    TextsOption,
    check_dtype,
    note_folders,
)
from alphaq.errors import AlphaQError
from alphaq.terminal import err, progress, show

TASKS = "Tasks (with --tasks)"


def certify(
    context: typer.Context,
    model: ModelArgument,
    reference: Annotated[str, typer.Option(help="The original model: folder, hub id or GGUF file.")],
    text: TextsOption,
    more: MoreTextsArgument = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; certificate.json beside the model by default.")
    ] = None,
    ear: Annotated[
        float, typer.Option(min=0, max=1, help="EAR that the verdict asks for; 0.99 is distribution-lossless.")
    ] = 0.99,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval, or YAML files of your own, comma-separated (alphaq[eval]).", rich_help_panel=TASKS
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of your own task files.", rich_help_panel=TASKS)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Documents of each task; all by default.", rich_help_panel=TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; the task's own number.", rich_help_panel=TASKS)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=TASKS)] = 1,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each text to use; all by default.")] = None,
    skip_tokens: Annotated[int, typer.Option(min=0, help="Tokens to leave out at the start of each text.")] = 0,
    bos: BosOption = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how faithful a model is to its original, with intervals and verdicts, and write certificate.json."""
    check_dtype(dtype)
    if tasks is None and (include_path, limit, num_fewshot, batch_size) != (None, None, None, 1):
        raise AlphaQError(
            "--include-path, --limit, --num-fewshot and --batch-size are of --tasks. Add it, or drop them."
        )
    from alphaq.checkpoint.writer import check_file
    from alphaq.evaluation.certificate import other_source
    from alphaq.evaluation.certify import certify as measure_fidelity
    from alphaq.evaluation.tasks import TaskRequest
    from alphaq.nouns.fidelity import CERTIFICATE_NAME
    from alphaq.report.tables import certificate_tables

    beside = Path(model).expanduser()
    if output is None:
        if not beside.exists():
            raise AlphaQError(
                f"{model} is no folder or file of this machine. Say where the certificate goes with -o FILE."
            )
        output = (beside if beside.is_dir() else beside.parent) / CERTIFICATE_NAME
    check_file(output)
    request = None
    if tasks is not None:
        request = TaskRequest.of(
            tasks, include_path=include_path, limit=limit, few_shot=num_fewshot, batch_size=batch_size
        )
    note_folders(model, reference)
    made = measure_fidelity(
        model,
        reference,
        [*text, *(more or ())],
        window,
        max_tokens,
        skip_tokens,
        device,
        dtype,
        ear,
        request,
        _command(context),
        progress,
        bos,
    )
    made.write(output)
    if note := other_source(made.model, made.reference):
        err.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    err.print(f"Certificate written to {output}", markup=False, highlight=False, soft_wrap=True)
    show(as_json, made.model_dump(mode="json"), *certificate_tables(made))


def _command(context: typer.Context) -> str:
    """The command as it was typed; what a terminal would obey is replaced, since certificates with it are refused."""
    typed = shlex.join(["alphaq", *(context.find_root().obj or ())])
    return "".join(char if char.isprintable() else "\ufffd" for char in typed)


def card(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `alphaq quantize` wrote.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File to write, - for stdout; README.md in OUT by default.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the original, such as Qwen/Qwen3-30B-A3B; where none is known.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="Folder of the original, for its card and licence where OUT has none (GGUF).")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate to quote; certificate.json in OUT by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that was edited since.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a Hugging Face model card: plan, sizes, certificate, commands; the original's card is kept below."""
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.report.card import README_NAME, make_card

    target = folder / README_NAME if output is None else None if output == "-" else Path(output)
    if target is not None:
        check_file(target)
    made = make_card(folder, target, base_model, source, certificate, force)
    for note in made.notes:
        err.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if target is not None:
        with atomic_file(target) as partial:
            partial.write_text(made.text, encoding="utf-8")
        err.print(f"Card written to {target}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        show(True, {"output": None if target is None else str(target), "metadata": made.metadata, "card": made.text})
    elif target is None:
        sys.stdout.write(made.text)
