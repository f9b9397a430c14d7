"""How work is done, which changes no result: arguments and options that commands share, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel, ConfigDict, Field

from alphaq.nouns.option import Option
from alphaq.terminal import note, progress

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.checkpoint.remote import Store
    from alphaq.measuring.cache import Cache
    from alphaq.measuring.resources import Resources

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a safetensors checkpoint, or a GGUF file.")
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `alphaq quantize` wrote.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
SkipOption = Annotated[
    float,
    typer.Option(
        "--skip-experts",
        metavar="SHARE",
        help="Leave out experts whose routing weight is below this share (0 to 1) of the token's largest; native only.",
    ),
]
RestartOption = Annotated[bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")]


class Means(BaseModel):
    """What a command works with."""

    model_config = ConfigDict(frozen=True)

    revision: Annotated[str | None, Option("Branch, tag or commit of a hub model.")] = None
    workers: Annotated[int | None, Option("Processes; all cores by default, fewer for a small model. Same result.")] = (
        Field(default=None, ge=1)
    )
    cluster: Annotated[
        str | None,
        Option(
            "Work on the nodes of a running Ray cluster; --workers is the most cores then. Same result.",
            metavar="ray[:HOST:PORT]",
        ),
    ] = None
    device: Annotated[str | None, Option("Where eigenvalues are computed: cpu (the default), cuda, cuda:1.")] = None
    no_cache: Annotated[bool, Option("Measure anew and keep nothing for the next run.")] = False
    hash_contents: Annotated[bool, Option("Recognise weights by their contents, not by when they were written.")] = (
        False
    )
    requantize: Annotated[bool, Option("Take a GGUF file whose weights are quantized already.")] = False
    pre_tokenizer: Annotated[
        str | None, Option("llama.cpp's name of the tokenizer's splitting rule, where it is not recognised.")
    ] = None
    converter: Annotated[
        Path | None,
        Option("llama.cpp checkout whose converter writes the model as GGUF first (engine llama.cpp).", metavar="DIR"),
    ] = None


@contextmanager
def resources_for(checkpoint: Checkpoint | None, means: Means) -> Iterator[Resources]:
    """Processes, and what earlier runs have measured of the checkpoint. Raises AlphaQError for what is not there."""
    from alphaq.measuring.resources import Resources
    from alphaq.spectra.device import check_device
    from alphaq.work.cluster import RayWorkers, parse_cluster
    from alphaq.work.workers import Workers, sensible_count

    device = means.device or "cpu"
    address = None if means.cluster is None else parse_cluster(means.cluster)
    if device != "cpu" and address is None:
        check_device(device)
    nbytes = 0 if checkpoint is None else checkpoint.nbytes
    with ExitStack() as stack:
        cache = None
        if checkpoint is not None and not means.no_cache:
            cache = stack.enter_context(_cache(checkpoint, means.hash_contents, device))
        if address is None:
            pool = Workers(means.workers or sensible_count(nbytes), checkpoint)
        else:
            pool = RayWorkers(address, checkpoint, means.workers)
        stack.enter_context(pool)
        if device != "cpu" and isinstance(pool, RayWorkers):
            pool.require_card(device)
        yield Resources(pool, cache, progress, device)


def _cache(checkpoint: Checkpoint, hash_contents: bool, device: str) -> Cache:
    from alphaq.measuring.cache import Cache

    identity = {
        "fingerprint": checkpoint.fingerprint,
        "contents": checkpoint.contents(hash_contents),
        "device": device.partition(":")[0],
    }
    return Cache(cache_folder(), identity)


def cache_folder() -> Path:
    """$ALPHAQ_CACHE, or alphaq in the user's cache folder."""
    if own := os.environ.get("ALPHAQ_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphaq"


def opened(model: str, means: Means, headers_only: bool = False) -> Checkpoint:
    """The checkpoint that a command is to work on; says what is not read of it.

    Raises AlphaQError for options that do not apply to it.
    """
    from dataclasses import replace

    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.errors import AlphaQError

    checkpoint = open_checkpoint(model, means.revision, means.requantize, headers_only)
    if means.requantize and checkpoint.gguf is None:
        raise AlphaQError(f"--requantize is for GGUF files, and {model} is none. Drop it.")
    if means.pre_tokenizer is not None and checkpoint.gguf is not None:
        raise AlphaQError(f"--pre-tokenizer is for folders: a GGUF file such as {model} names its own. Drop it.")
    note(*checkpoint.notes)
    return replace(checkpoint, pre_tokenizer=means.pre_tokenizer)


def note_folders(*models: str | Path | None) -> None:
    """Say what lies in models' folders and is not read, where transformers will load them."""
    from alphaq.checkpoint.weights import weight_files

    for model in models:
        folder = None if model is None else Path(model).expanduser()
        if folder is not None and (folder / "config.json").is_file():
            note(*(f"{model}: {line}" for line in weight_files(folder).notes()))


def output_target(output: str, scratch: Path | None) -> Path | Store:
    """Where an output goes. Raises AlphaQError."""
    from alphaq.checkpoint.remote import Store, is_url, local_path
    from alphaq.errors import AlphaQError

    path = local_path(output) if is_url(output) else Path(output)
    if path is None:
        if scratch is not None and not scratch.is_dir():
            raise AlphaQError(f"--scratch {scratch} is not a folder. Create it first.")
        return Store.of(output)
    if scratch is not None:
        raise AlphaQError("--scratch is for outputs that are uploaded. Drop it, or give -o an address such as s3://...")
    return path
