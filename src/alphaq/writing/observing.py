"""An importance matrix of a checkpoint's own, from what it writes itself.

The best tells what an error in a column costs in nats: it is the Fisher information that the default method plans by.
Where the backward pass for it cannot be run, the importance is what llama.cpp's own tools make of it: how large the
values are that each column is multiplied with, seen when llama.cpp runs the model. A GGUF file is run as it is; a
folder is first written as one, in 16 bits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from alphaq.calibration.fisher import Fisher
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix, positive, read_imatrix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.gguf.converter import require_room
from alphaq.engines.gguf.gathering import Gathered, Sample, gather_apart
from alphaq.engines.gguf.importance_file import write_imatrix
from alphaq.engines.gguf.model import gguf_tensors
from alphaq.engines.gguf.profile import FILE_NAME, PROFILE
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.planning.passes import PassRun, fisher
from alphaq.work.cores import available_cores
from alphaq.writing.planned import INPUTS, LOSSES, OWN
from alphaq.writing.quantizing import quantize
from alphaq.writing.records import WriteOptions

VERSION = 3
"""Raise it whenever the same model would be observed differently."""
OWN_DATASET = "the model's own writing"


OWN_SAMPLE = Sample()


def own_matrix(way: str, tensors: dict[str, np.ndarray]) -> ImportanceMatrix:
    """A model's own importance matrix, told from others by its values: they depend on the way that could be taken, on
    the sample, and a little on the machine."""
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.shape}".encode())
        digest.update(values.astype("<f4").tobytes())
    return ImportanceMatrix(OWN, f"{way}-{digest.hexdigest()[:16]}", tensors)


def importance_by_losses(checkpoint: Checkpoint, bos: bool = True, resources: Resources = USUAL) -> ImportanceMatrix:
    """What an error in each column costs. bos: as in the plan that the matrix is for.

    Raises as the pass does: PassError where it cannot be run; PlanError for layers that llama.cpp cannot take.
    """
    PROFILE.check_layers(checkpoint)
    return importance_of_losses(checkpoint, fisher(PassRun(checkpoint, bos, None, (), resources)))


def importance_of_losses(checkpoint: Checkpoint, passed: Fisher) -> ImportanceMatrix:
    """What an error in each column costs, relative to its matrix, of a pass that has been run. Entries are there for
    tensors all of whose matrices the pass was shown."""
    found = passed.matrices
    tensors = {
        recipe.name: positive(np.stack([found[matrix.name].columns for matrix in recipe.matrices]))
        for recipe in gguf_tensors(checkpoint)
        if recipe.matrices
        and not recipe.transform.startswith("kv_b")
        and found.keys() >= {m.name for m in recipe.matrices}
    }
    return own_matrix(LOSSES, tensors)


def importance_by_inputs(checkpoint: Checkpoint, scratch: Path, resources: Resources = USUAL) -> ImportanceMatrix:
    """What llama.cpp sees of the model's own writing, or what the cache keeps of the same model's. scratch: an existing
    folder, where the model lies in 16 bits meanwhile.

    Raises as `observe` does.
    """

    def write(path: Path) -> None:
        with TemporaryDirectory(prefix=".alphaq-imatrix-", dir=scratch) as folder:
            write_imatrix(path, observe(checkpoint, Path(folder), resources, OWN_SAMPLE), (OWN_DATASET,))

    depends_on = f"{VERSION} {OWN_SAMPLE} {checkpoint.settings_digest()}"
    if resources.cache is not None:
        key = f"imatrix-{hashlib.sha256(depends_on.encode()).hexdigest()[:24]}.gguf"
        return resources.cache.recall_file(key, write, _read)
    with TemporaryDirectory(prefix=".alphaq-imatrix-", dir=scratch) as folder:
        path = Path(folder) / "imatrix.gguf"
        write(path)
        return _read(path)


def _read(path: Path) -> ImportanceMatrix:
    return own_matrix(INPUTS, read_imatrix(path).tensors)


def observe(checkpoint: Checkpoint, scratch: Path, resources: Resources, sample: Sample) -> Gathered:
    """Run a checkpoint on a sample. Raises AlphaQError where llama.cpp cannot run it."""
    return gather_apart(in_16_bits(checkpoint, scratch, resources), sample, available_cores(), resources.wrap)


def bytes_in_16_bits(checkpoint: Checkpoint) -> int:
    """How large the file is that has to be written before llama.cpp can run a checkpoint; 0 for a GGUF file.

    Raises AlphaQError where there can be none, as of layers with numbers of experts of their own.
    """
    return 0 if checkpoint.gguf is not None else PROFILE.writer.layout(checkpoint, _in_16_bits(checkpoint)).size_bytes


def in_16_bits(checkpoint: Checkpoint, scratch: Path, resources: Resources = USUAL) -> Path:
    """A file that llama.cpp runs: a GGUF file itself, or one that is written into the folder `scratch`.

    Raises OutputError where there is no room for it.
    """
    if checkpoint.gguf is not None:
        return checkpoint.gguf.folder / checkpoint.gguf.files[0]
    require_room(bytes_in_16_bits(checkpoint), scratch)
    plan = Plan(engine=PROFILE.name, choices={name: str(choice) for name, choice in _in_16_bits(checkpoint).items()})
    quantize(checkpoint, plan, scratch / "whole", WriteOptions(check=False), resources)
    return scratch / "whole" / FILE_NAME


def _in_16_bits(checkpoint: Checkpoint) -> dict[str, Choice]:
    PROFILE.check_layers(checkpoint)
    return {matrix.name: Choice(16) for matrix in checkpoint.planned}
