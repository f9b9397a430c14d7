"""An importance matrix of a checkpoint's own: what its weights see when llama.cpp runs it.

A GGUF file is run as it is; a folder is first written as one, in 16 bits.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix, read_imatrix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.gguf.gathering import Gathered, Sample, gather_apart
from alphaq.engines.gguf.importance_file import write_imatrix
from alphaq.engines.gguf.profile import FILE_NAME, PROFILE
from alphaq.errors import CheckpointError
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.work.workers import available_cores
from alphaq.writing.quantizing import quantize
from alphaq.writing.records import WriteOptions

SELF = "self"
VERSION = 1
"""Raise it whenever the same model would be observed differently."""
OWN_DATASET = "the model's own writing"


OWN_SAMPLE = Sample()
OWN_DIGEST = hashlib.sha256(f"{VERSION} {OWN_SAMPLE}".encode()).hexdigest()[:16]
"""Of how it is made, which is known before, and with the model decides about all of it."""


def own_name() -> str:
    """Name and digest of a model's own importance matrix."""
    return f"{SELF} {OWN_DIGEST}"


def own_importance(
    checkpoint: Checkpoint, scratch: Path | None = None, resources: Resources = USUAL
) -> ImportanceMatrix:
    """Of the model's own writing, or what the cache keeps of the same model's. scratch: an existing folder, where the
    model lies in 16 bits meanwhile.

    Raises as `observe` does.
    """

    def make() -> str:
        with TemporaryDirectory(prefix=".alphaq-imatrix-", dir=scratch) as folder:
            path = Path(folder) / "imatrix.gguf"
            write_imatrix(path, observe(checkpoint, Path(folder), resources, OWN_SAMPLE), (OWN_DATASET,))
            return b64encode(path.read_bytes()).decode()

    if resources.cache is None:
        return _parsed(make())
    settings = hashlib.sha256(checkpoint.settings_digest().encode()).hexdigest()[:16]
    return resources.cache.recall(f"imatrix-{OWN_DIGEST}-{settings}.base64", make, _parsed)


def _parsed(text: str) -> ImportanceMatrix:
    """What a file holds whose bytes these are. Raises CheckpointError if it is damaged."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "imatrix.gguf"
        try:
            path.write_bytes(b64decode(text, validate=True))
        except ValueError as error:
            raise CheckpointError(f"{path.name} in the cache is damaged ({error}).") from None
        return replace(read_imatrix(path), name=SELF, digest=OWN_DIGEST)


def observe(checkpoint: Checkpoint, scratch: Path, resources: Resources, sample: Sample) -> Gathered:
    """Run a checkpoint on a sample. Raises AlphaQError where llama.cpp cannot run it."""
    return gather_apart(in_16_bits(checkpoint, scratch, resources), sample, available_cores(), resources.wrap)


def in_16_bits(checkpoint: Checkpoint, scratch: Path, resources: Resources = USUAL) -> Path:
    """A file that llama.cpp runs: a GGUF file itself, or one that is written into the folder `scratch`."""
    if checkpoint.gguf is not None:
        return checkpoint.gguf.folder / checkpoint.gguf.files[0]
    plan = Plan(engine=PROFILE.name, choices={matrix.name: str(Choice(16)) for matrix in checkpoint.planned})
    quantize(checkpoint, plan, scratch / "whole", WriteOptions(check=False), resources)
    return scratch / "whole" / FILE_NAME
