"""One task per matrix or kept tensor: made from its own source, put at its place, and recorded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from alphaq.checkpoint.files import CHUNK_BYTES, PlainFile
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.checkpoint.tensors import rows_place
from alphaq.checkpoint.writer import Place, checksum, pieces_at, write_at
from alphaq.engines.export import Entry, Export, Form, squared_error_of
from alphaq.engines.output import Record
from alphaq.engines.profiles import profile
from alphaq.errors import QuantizationError
from alphaq.formats.coding import decode_tensor
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.quantizers.base import Rounder
from alphaq.quantizers.rounded import SourceMatrix, relative, rounded
from alphaq.simd.sums import squared_norm
from alphaq.simd.vectors import flat
from alphaq.work.workers import Workers
from alphaq.writing.coded import coded_tensor, spec_of, tensor_of
from alphaq.writing.spreading import Here, partly_here

CODING_TIMES = 4  # bytes held while a tensor is coded, for each of its own


@dataclass(frozen=True, slots=True)
class Written:
    """One entry that is at its places. coded: dtype and shape of its tensor as coded, None where none was to be."""

    record: Record
    coded: TensorSpec | None = None


@dataclass(frozen=True, slots=True)
class StoreTask:
    """One entry of an output to make.

    specs: dtype and shape of what is at each of its places. codes: whether its one tensor is coded into its place,
    which has room for that. earlier: what an interrupted run has written of it. shared: folder of quantized matrices
    that several runs on the same checkpoint share. importance: of the columns, where a user brings it.
    """

    entry: Entry
    engine: str
    folder: Path
    quantizer: str
    specs: tuple[TensorSpec, ...] = ()
    codes: bool = False
    earlier: Written | None = None
    shared: Path | None = None
    importance: np.ndarray | None = None

    @property
    def tensor(self) -> str:
        """The stored tensor that is read."""
        return source_tensor(self.entry)

    @property
    def nbytes(self) -> int:
        """Bytes of source held while the task runs."""
        return held_bytes(self.entry) + (CODING_TIMES * self.specs[0].nbytes if self.codes else 0)

    def places(self, coded: TensorSpec | None) -> tuple[Place, ...]:
        """Where its bytes are, once they are written. coded: what its tensor has become, if it was coded."""
        return self.entry.places if coded is None else (replace(self.entry.places[0], nbytes=coded.nbytes),)


def source_tensor(entry: Entry) -> str:
    """The stored tensor that an entry is made of."""
    return entry.source if isinstance(entry.source, str) else entry.source.tensor


def held_bytes(entry: Entry) -> int:
    """A kept tensor is copied in chunks, unless its values change on the way; then it is held, twice at most."""
    if isinstance(entry.source, MatrixRef):
        return 2 * entry.source.parameters
    return max(CHUNK_BYTES, 2 * sum(place.nbytes for place in entry.places)) if entry.form.changes else CHUNK_BYTES


# -- what is stored -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A quantized matrix on its way to who writes it. Arrays: those travel without being copied."""

    data: tuple[np.ndarray, ...]
    relative_error: float

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor], relative_error: float) -> Made:
        """From the tensors to store."""
        return cls(tuple(np.asarray(bytes_of(tensor)) for tensor in tensors), relative_error)

    def pieces(self) -> list[memoryview]:
        """The bytes to store."""
        return [piece.data for piece in self.data]


def make(checkpoint: Checkpoint, task: StoreTask, by_inputs: Rounder | None = None) -> Made:
    """A matrix as its engine stores it.

    by_inputs: rounds instead of the task's own quantizer; its errors are taken anew, from what the engine will read.
    """
    entry, matrix, writer = task.entry, task.entry.source, profile(task.engine).writer
    assert entry.choice is not None and isinstance(matrix, MatrixRef)  # a matrix always has one
    source = SourceMatrix(checkpoint, matrix, task.quantizer, task.importance)
    if writer.holds_codes and by_inputs is None and (own := source.cut(entry.choice)) is not None:
        return Made.of((own.native(),), relative(own.squared_error, own.energy or 0.0))
    weight = writer.convert(source.weight, entry.form, checkpoint)
    tensors, error = _quantized(weight, entry.choice, entry.name, writer, by_inputs or source.rounder)
    if by_inputs is not None and not entry.choice.kept:
        error = squared_error_of(writer.reader(tensors, entry.choice, matrix.shape, entry.name), weight)
    return Made.of(tensors, relative(error, squared_norm(weight)))


def _quantized(
    weight: torch.Tensor, choice: Choice, name: str, writer: Export, rounder: Rounder
) -> tuple[Sequence[torch.Tensor], float]:
    """The tensors to store and their Σ(w − ŵ)²."""
    result = rounded(weight, choice, name, rounder)
    if not isinstance(result.values, torch.Tensor):
        return writer.encode(result.values), result.squared_error
    if not math.isfinite(result.squared_error):
        if torch.isfinite(weight).all():
            kept = result.values.dtype
            raise QuantizationError(f"{name} holds weights too large for {kept}. Give it fewer bits than 16.")
        raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")
    return (result.values,), result.squared_error


def kept_pieces(checkpoint: Checkpoint, engine: str, tensor: str, form: Form) -> Iterator[memoryview]:
    """The bytes to store for a tensor that is kept: its own, unless they are encoded or the engine wants others."""
    shard = checkpoint.shard_of[tensor]
    info = checkpoint.shards[shard][tensor]
    slices = () if info.encoding is None or info.encoding.scheme != "plain" else info.encoding.kept
    if slices and not form.changes:
        places = (rows_place(info, index, 0, info.shape[1]) for index in range(len(slices)))
        return (piece for place in places for piece in checkpoint.file(shard).chunks(*place))
    if not form.raw and (form.changes or info.encoding is not None):
        return iter([bytes_of(profile(engine).writer.convert(checkpoint.tensor(tensor), form, checkpoint))])
    return checkpoint.file(shard).chunks(info.begin, info.nbytes)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """What a file holds of a tensor."""
    return flat(tensor.contiguous()).view(np.uint8).data


# -- storing --------------------------------------------------------------------------------------


def store(checkpoint: Checkpoint, task: StoreTask, by_inputs: Rounder | None = None) -> Written:
    """Make one entry and put it at its places, unless it is there already.

    by_inputs: see `make`; such a matrix is not shared with other runs.
    """
    source = task.entry.source
    if task.earlier is not None and _is_there(task, task.earlier):
        return task.earlier
    if isinstance(source, str):
        return _put(task, kept_pieces(checkpoint, task.engine, source, task.entry.form))
    block = None if task.shared is None or by_inputs is not None else _shared_block(task.shared, task)
    if block is not None and (record := _shared_record(block)) is not None:
        return _put(task, PlainFile(block).chunks(0, block.stat().st_size), record.relative_error)
    made = make(checkpoint, task, by_inputs)
    written = _put(task, made.pieces(), made.relative_error)
    if block is not None:
        _share(block, made)
    return written


def _is_there(task: StoreTask, earlier: Written) -> bool:
    """Whether what an interrupted run has written is at its places."""
    return checksum(pieces_at(task.folder, task.places(earlier.coded))) == earlier.record.blake2b


def _put(task: StoreTask, pieces: Iterable[memoryview], relative_error: float | None = None) -> Written:
    """Put an entry's bytes at its places, coded if it is to be."""
    entry, coded = task.entry, None
    if task.codes:
        tensor = coded_tensor(tensor_of(pieces, task.specs[0]), entry.name)
        pieces, coded = [bytes_of(tensor)], spec_of(tensor)
    record = Record(
        blake2b=write_at(task.folder, task.places(coded), pieces),
        relative_error=relative_error,
        parts=None if entry.parts == ((entry.name, None),) else entry.parts,
    )
    return Written(record, coded)


def read_back(checkpoint: Checkpoint, task: StoreTask, written: Written) -> torch.Tensor:
    """What the engine will compute with, float32 [rows, columns]; the original where the engine has another layout."""
    entry, matrix = task.entry, task.entry.source
    assert entry.choice is not None and isinstance(matrix, MatrixRef)  # kept tensors are not asked for
    if entry.form.changes:
        return checkpoint.read(matrix).float()
    specs = task.specs if written.coded is None else (written.coded,)
    parts = [
        decode_tensor(tensor_of(pieces_at(task.folder, [place]), spec), entry.name).reshape(-1)
        for place, spec in zip(task.places(written.coded), specs, strict=True)
    ]
    rows = profile(task.engine).writer.reader(parts, entry.choice, matrix.shape, matrix.name)
    return rows(slice(0, matrix.shape[0])).float()


def stored(workers: Workers, tasks: Sequence[StoreTask], expected: Iterable[StoreTask]) -> Iterator[Written]:
    """Make the entries and put them at their places; what was written, in order.

    Where the workers do not have the folder, matrices are made there and written here, and kept tensors, which are
    only copied, are copied here. expected: the same tasks, announced to whoever reads ahead.
    """
    if not tasks or workers.shares(tasks[0].folder):
        yield from workers.map(store, expected, lambda task: task.nbytes)
        return
    here = partial(_stored_here, workers.shared)
    yield from partly_here(workers, tasks, here, lambda task: replace(task, shared=None), make, _received)


def _stored_here(checkpoint: Checkpoint, task: StoreTask) -> Here[Written] | None:
    """What needs no worker."""
    there = task.earlier is not None and _is_there(task, task.earlier)
    shared = task.shared is not None and _shared_record(_shared_block(task.shared, task)) is not None
    return Here(store(checkpoint, task)) if there or shared or isinstance(task.entry.source, str) else None


def _received(task: StoreTask, made: Made) -> Written:
    """Write what a worker has made."""
    written = _put(task, made.pieces(), made.relative_error)
    if task.shared is not None:
        _share(_shared_block(task.shared, task), made)
    return written


# -- shared with other runs -----------------------------------------------------------------------


def _shared_block(folder: Path, task: StoreTask) -> Path:
    made_of = f"{task.entry.name} {task.entry.choice} {task.quantizer}"
    return folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.block"


def _shared_record(block: Path) -> Record | None:
    """The record of a shared block, or None if it is not there or damaged."""
    try:
        record = Record.model_validate_json(block.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    return record if checksum(PlainFile(block).chunks(0, block.stat().st_size)) == record.blake2b else None


def _share(block: Path, made: Made) -> None:
    block.write_bytes(b"".join(made.pieces()))
    record = Record(blake2b=checksum(made.pieces()), relative_error=made.relative_error)
    # Last: it vouches for the data.
    block.with_suffix(".json").write_text(record.model_dump_json(), encoding="utf-8")
