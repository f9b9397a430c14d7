"""`alphaq imatrix`: an importance matrix for llama.cpp's quantizers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from alphaq.cli.inputs import note_whole_file
from alphaq.cli.means import JsonOption, Means, opened
from alphaq.cli.options import Shown
from alphaq.errors import AlphaQError
from alphaq.terminal import note, progress, show

if TYPE_CHECKING:
    from alphaq.engines.gguf.gathering import Gathered, Sample

WAYS = {
    "text": "of text",
    "written": "that the model wrote",
    "rewritten": "that the model made of random tokens in one pass, as its file has more than 8 GiB",
}
MOST_NAMED = 5


def imatrix(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="GGUF file of any architecture, or folder or hub id that AlphaQ writes as one."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: imatrix.gguf.")],
    means: Annotated[Means, Shown(only=("revision", "pre_tokenizer"))],
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to run instead of the model's own writing; may be repeated.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many; by default all of the texts, or of its own writing enough for the experts."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, max=1 << 17, help="Tokens that are seen together.")] = 256,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the model's own writing; 0 by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a model in llama.cpp and write the importance of its columns, from its own writing or from text."""
    from alphaq.checkpoint.writer import check_file
    from alphaq.engines.gguf.gathering import Sample
    from alphaq.engines.gguf.importance_file import write_imatrix
    from alphaq.writing.observing import OWN_DATASET

    check_file(output)
    if text and seed is not None:
        raise AlphaQError("--seed is for the model's own writing, and --text is run instead. Drop one of them.")
    sample = Sample(tuple(text or ()), tokens, window, seed or 0)
    if missing := next((path for path in sample.texts if not path.is_file()), None):
        raise AlphaQError(f"No text file {missing}. Give a UTF-8 text with --text.")
    gathered = _gathered(model, means, sample, output.absolute().parent)
    write_imatrix(output, gathered, [path.name for path in sample.texts] or [OWN_DATASET])
    _show(output, gathered, as_json)


def _gathered(model: str, means: Means, sample: Sample, beside: Path) -> Gathered:
    from alphaq.checkpoint.reader import expanded, find_gguf, is_url
    from alphaq.engines.gguf.gathering import gather_apart
    from alphaq.measuring.resources import Resources
    from alphaq.work.cores import available_cores
    from alphaq.writing.observing import observe

    path = None if is_url(model) else find_gguf(expanded(model))
    if path is not None:
        for option, typed in (("--revision", means.revision), ("--pre-tokenizer", means.pre_tokenizer)):
            if typed is not None:
                raise AlphaQError(f"{option} does nothing for a GGUF file such as {path}. Drop it.")
        return gather_apart(path, sample, available_cores(), progress)
    checkpoint = opened(model, means)
    note_whole_file(checkpoint, beside)
    with TemporaryDirectory(prefix=".alphaq-imatrix-", dir=beside) as scratch:
        return observe(checkpoint, Path(scratch), Resources(wrap=progress), sample)


def _show(output: Path, gathered: Gathered, as_json: bool) -> None:
    from alphaq.checkpoint.gguf.imatrix import PRIOR_TOKENS

    seen, (count, length) = gathered.seen, gathered.ids.shape
    stacks = (moments for name, moments in seen.moments.items() if "_exps." in name)  # heads are counted too
    experts = [tokens for moments in stacks for tokens in moments.tokens]
    few = sum(bool(tokens < PRIOR_TOKENS) for tokens in experts)
    said = [f"{output}: {len(seen.moments)} tensors, from {count} windows of {length} tokens {WAYS[gathered.way]}"]
    if few:
        said.append(
            f"{few} of {len(experts)} matrices of experts saw fewer than {PRIOR_TOKENS} tokens; more --tokens help"
        )
    note(*(f"nothing is known of {name}: {why}" for name, why in list(seen.skipped.items())[:MOST_NAMED]))
    record = {
        "out": str(output),
        "tensors": len(seen.moments),
        "windows": count,
        "window": length,
        "way": gathered.way,
        "expert_matrices": len(experts),
        "seldom_reached": few,
        "skipped": seen.skipped,
        "stream": {name: (energy / tokens) ** 0.5 for name, (energy, tokens) in seen.stream.items() if tokens},
    }
    show(as_json, record, "\n".join(said))
