"""`alphaq generate`: what a model writes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, ModelArgument, SkipOption, note_folders
from alphaq.nouns.sampling import Sampling
from alphaq.terminal import show


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    sampling: Sampling,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the GPU if there is one.")] = None,
    skip_experts: SkipOption = 0.0,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Run tokens after the prompt from a recorded list of operations: small native models decode several "
            "times as fast on a CPU. Compiling takes up to a minute, once.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt: with the most likely token each time, or with --temperature a drawn one."""
    from alphaq.runtime.loading import generate_text
    from alphaq.runtime.skipping import check_share

    check_share(skip_experts)
    note_folders(model)
    completion = generate_text(model, prompt, max_new_tokens, device, sampling, skip_experts, record)
    if as_json:
        show(True, {"model": model, "prompt": prompt, "completion": completion})
    else:
        sys.stdout.write(prompt + completion + "\n")
