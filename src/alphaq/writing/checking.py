"""What was written, read again: its checksum, its form, its choice, and its error against the source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from alphaq.checkpoint.files import CHUNK_BYTES, PlainFile
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import DTYPE_NAMES
from alphaq.checkpoint.writer import Place, checksum, pieces_at
from alphaq.engines.export import Entry, Export, Stored, squared_error_of
from alphaq.engines.output import Record
from alphaq.engines.profiles import profile
from alphaq.errors import CheckpointError
from alphaq.formats.coding import decode_tensor, is_coded
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.quantizers.rounded import SourceMatrix, relative
from alphaq.simd.sums import squared_distance, squared_norm
from alphaq.work.workers import Workers
from alphaq.writing.spreading import Here, partly_here
from alphaq.writing.storing import bytes_of, held_bytes, kept_pieces, source_tensor


@dataclass(frozen=True, slots=True)
class CheckTask:
    """One written entry to read again; `entry` only if it is to be compared with the original."""

    name: str
    engine: str
    folder: Path
    record: Record
    choice: Choice | None
    stored: tuple[Stored, ...]
    places: tuple[Place, ...]
    entry: Entry | None = None
    data: tuple[np.ndarray, ...] | None = None
    """The bytes at the places, where who checks does not have the folder."""

    @property
    def tensor(self) -> str | None:
        """The stored tensor that is read."""
        return None if self.entry is None else source_tensor(self.entry)

    @property
    def nbytes(self) -> int:
        """Bytes held while the task runs."""
        return CHUNK_BYTES if self.entry is None else held_bytes(self.entry)

    def pieces(self) -> Iterator[memoryview]:
        """What was written."""
        return pieces_at(self.folder, self.places) if self.data is None else iter([one.data for one in self.data])

    def decoded(self) -> tuple[list[Stored], list[torch.Tensor]]:
        """What was written, as the tensors it is, decoded if they are coded, flat. Raises CheckpointError by name."""
        if self.data is not None:
            raw = [torch.from_numpy(one.copy()) for one in self.data]  # what has travelled cannot be written to
        else:
            raw = [PlainFile(self.folder / place.file).read(place.begin, place.nbytes) for place in self.places]
        pairs = [_decoded(one, one.typed(data), self.name) for one, data in zip(self.stored, raw, strict=True)]
        return [one for one, _ in pairs], [values for _, values in pairs]

    def sent(self) -> CheckTask:
        """The task with the bytes that were written."""
        raw = (PlainFile(self.folder / place.file).read(place.begin, place.nbytes) for place in self.places)
        return replace(self, data=tuple(one.numpy() for one in raw))


def _decoded(stored: Stored, values: torch.Tensor, name: str) -> tuple[Stored, torch.Tensor]:
    if not is_coded(values):
        return stored, values
    values = decode_tensor(values, name)
    return replace(stored, dtype=DTYPE_NAMES[values.dtype], shape=tuple(values.shape)), values.reshape(-1)


def checked(workers: Workers, tasks: Sequence[CheckTask]) -> Iterator[str | None]:
    """`check` of each task in order; where the workers do not have the folder, they are sent what was written."""
    if not tasks or workers.shares(tasks[0].folder):
        yield from workers.map(check, tasks, lambda task: task.nbytes)
        return
    here = partial(_checked_here, workers.shared)
    yield from partly_here(workers, tasks, here, CheckTask.sent, check, lambda task, fault: fault)


def _checked_here(source: Checkpoint | None, task: CheckTask) -> Here[str | None] | None:
    """What needs no worker."""
    return Here(check(source, task)) if task.choice is None or task.entry is None else None


def check(source: Checkpoint | None, task: CheckTask) -> str | None:
    """What is wrong with one written entry (checksum, form, choice, error against its source), or None."""
    if checksum(task.pieces()) != task.record.blake2b:
        return f"{task.name} does not have its checksum (the file is damaged)"
    writer = profile(task.engine).writer
    if task.choice is None:
        return _kept_fault(source, task, writer)
    return _quantized_fault(source, task, task.choice, writer)


def _kept_fault(source: Checkpoint | None, task: CheckTask, writer: Export) -> str | None:
    """Whether a tensor that is kept is its source's."""
    if source is None or task.entry is None or not isinstance(task.entry.source, str):
        return None
    original = checksum(kept_pieces(source, task.engine, task.entry.source, task.entry.form))
    if original == task.record.blake2b:
        return None
    if writer.codable:
        try:
            _, (values,) = task.decoded()
        except CheckpointError as damaged:
            return str(damaged)
        if checksum([bytes_of(values)]) == original:
            return None
    return f"{task.name} differs from its source"


def _quantized_fault(source: Checkpoint | None, task: CheckTask, choice: Choice, writer: Export) -> str | None:
    """Whether a matrix has its choice's form and, of its source, the error that was recorded."""
    try:
        stored, parts = task.decoded()
    except CheckpointError as damaged:
        return str(damaged)
    fault = writer.fault(task.name, choice, stored, parts)
    if fault is not None or source is None or task.entry is None:
        return fault
    assert isinstance(task.entry.source, MatrixRef)
    matrix = SourceMatrix(source, task.entry.source)
    if writer.holds_codes and (own := matrix.cut(choice)) is not None and torch.equal(own.native(), parts[0]):
        return _error_fault(task, relative(own.squared_error, own.energy or 0.0))
    weight = writer.convert(matrix.weight, task.entry.form, source)
    if choice.kept:
        error = squared_distance(weight, parts[0].view(weight.shape))
    else:
        try:
            error = squared_error_of(writer.reader(parts, choice, task.entry.source.shape, task.name), weight)
        except CheckpointError as damaged:
            return str(damaged)
    return _error_fault(task, relative(error, squared_norm(weight)))


def _error_fault(task: CheckTask, error: float) -> str | None:
    """What is wrong with a relative error, or None."""
    agreed = task.record.relative_error or 0.0
    if abs(error - agreed) > 1e-6 * (1 + agreed):
        return f"{task.name} has relative error {error:.3g} against its source, not {agreed:.3g}"
    return None
