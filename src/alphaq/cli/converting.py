"""Checkpoints that only llama.cpp's own converter can bring into a file of its engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alphaq.cli.means import Means, opened
from alphaq.errors import AlphaQError, ArchitectureError
from alphaq.terminal import note

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint


@contextmanager
def opened_for(engine: str, model: str, means: Means, beside: Path, headers_only: bool = False) -> Iterator[Checkpoint]:
    """The checkpoint that a command is to work on, as a GGUF file where that has to be made first.

    beside: folder for that file, until the command is done. headers_only: weights of a hub model stay there. Raises
    AlphaQError.
    """
    from alphaq.engines.gguf.profile import PROFILE

    if engine != PROFILE.name:
        if means.converter is not None:
            raise AlphaQError(f"--converter makes a GGUF file, which is for {PROFILE.name}. Drop it.")
        yield opened(model, means, headers_only)
        return
    with ExitStack() as stack:
        checkpoint = None if means.converter is not None else _opened_here(model, means, headers_only)
        if checkpoint is None:
            made = stack.enter_context(_converted(model, means, beside))
            checkpoint = opened(str(made), means.model_copy(update={"revision": None}))
        yield checkpoint


def _opened_here(model: str, means: Means, headers_only: bool) -> Checkpoint | None:
    """The checkpoint, or None if the converter has to read it. Raises ArchitectureError if there is no converter."""
    from alphaq.checkpoint.reader import expanded, find_gguf
    from alphaq.engines.gguf.converter import REMEDY, find_converter

    try:
        checkpoint = opened(model, means, headers_only)
        if checkpoint.gguf is not None or checkpoint.architecture.gguf is not None:
            return checkpoint
        why = f"AlphaQ knows the family {checkpoint.architecture.name!r}, but not how llama.cpp calls its tensors."
    except ArchitectureError as error:
        if find_gguf(expanded(model)) is not None:
            raise
        why = str(error)
    if find_converter(None) is None:
        raise ArchitectureError(f"{why} {REMEDY}")
    note(why)
    return None


@contextmanager
def _converted(model: str, means: Means, beside: Path) -> Iterator[Path]:
    """The model's 16-bit GGUF file; says how large it is to be. beside: made later, if it is not there."""
    from alphaq.checkpoint.hub import expanded, resolve_folder
    from alphaq.checkpoint.remote import is_url
    from alphaq.engines.gguf import converter
    from alphaq.report.tables import human_bytes

    script = converter.find_converter(means.converter)
    assert script is not None  # or the caller would have said so
    if is_url(model) or expanded(model).is_file():
        raise AlphaQError(f"--converter reads a model's folder on this machine, not {model}. Drop it, or download.")
    if means.requantize:
        raise AlphaQError("--requantize is for GGUF files; the converter starts from the model's folder. Drop it.")
    folder = resolve_folder(model, means.revision)
    nbytes = converter.converted_bytes(folder)
    beside = next(place for place in (beside.absolute(), *beside.absolute().parents) if place.is_dir())
    converter.require_room(nbytes, beside)
    note(
        f"llama.cpp's converter ({script}) writes {model} as a GGUF file in 16 bits first: about {human_bytes(nbytes)} "
        f"in {beside}, removed afterwards"
    )
    name = Path(model).expanduser().resolve().name if expanded(model).is_dir() else model.rpartition("/")[2]
    with converter.converted(folder, name, script, beside) as path:
        yield path
