"""The stage between a plan and files: one task per matrix or kept tensor, each with only its own source in memory."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from alphaq.checkpoint.files import CHUNK_BYTES, PlainFile
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import DTYPE_NAMES
from alphaq.checkpoint.writer import Place, checksum, pieces_at, write_at
from alphaq.engines.export import Entry, Export, Form, Stored, squared_error_of
from alphaq.engines.output import Record
from alphaq.engines.profiles import profile
from alphaq.errors import CheckpointError, PlanError, QuantizationError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.plan import Plan
from alphaq.quantizers.base import Rounder, rounder_of, sixteen_bits
from alphaq.quantizers.coding import decode_tensor, is_coded
from alphaq.quantizers.cutting import CUTS, can_cut, cut, held_form
from alphaq.quantizers.packing import encode
from alphaq.simd.sums import squared_distance, squared_norm
from alphaq.simd.vectors import flat
from alphaq.work.workers import Workers

S = TypeVar("S")
T = TypeVar("T")


def plan_choices(plan: Plan, checkpoint: Checkpoint) -> dict[str, Choice]:
    """The plan's choices, checked against the checkpoint it is to be used on.

    Raises PlanError if it was made for other weights, names a matrix that is not there, or leaves one out.
    """
    if plan.source is not None and plan.source.fingerprint != checkpoint.fingerprint:
        raise PlanError(
            f"The plan was made for {plan.source.name!r} with other weight files than {checkpoint.name!r}. "
            "Make a new plan for this checkpoint."
        )
    known = {matrix.name for matrix in checkpoint.matrices}
    choices = plan.every_choice()
    for name in choices:
        if name not in known:
            raise PlanError(f"The plan names {name!r}, which {checkpoint.name} does not have. Make a new plan for it.")
    forgotten = [matrix.name for matrix in checkpoint.planned if matrix.name not in choices]
    if forgotten:
        raise PlanError(
            f"The plan leaves out {len(forgotten)} matrices, first {forgotten[0]!r}. "
            "Give each a choice; '16' keeps a matrix as it is."
        )
    return choices


@dataclass(frozen=True, slots=True)
class StoreTask:
    """One entry of an output to make."""

    entry: Entry
    engine: str
    folder: Path
    quantizer: str
    found: Record | None = None
    """What an interrupted run has noted of it."""
    shared: Path | None = None
    """Folder of quantized matrices that several runs on the same checkpoint share."""
    importance: np.ndarray | None = None
    """Of the columns, where a user brings it."""

    @property
    def tensor(self) -> str:
        """The stored tensor that is read."""
        return _tensor_of(self.entry)

    @property
    def nbytes(self) -> int:
        """Bytes of source held while the task runs."""
        return _held_bytes(self.entry)


def _tensor_of(entry: Entry) -> str:
    return entry.source if isinstance(entry.source, str) else entry.source.tensor


def _held_bytes(entry: Entry) -> int:
    """A kept tensor is copied in chunks, unless its values change on the way; then it is held, twice at most."""
    if isinstance(entry.source, MatrixRef):
        return 2 * entry.source.parameters
    return max(CHUNK_BYTES, 2 * sum(place.nbytes for place in entry.places)) if entry.form.changes else CHUNK_BYTES


def store(checkpoint: Checkpoint, task: StoreTask, quantizer: Rounder | None = None) -> Record:
    """Make one entry and put it at its places, unless it is there already; returns its manifest entry.

    quantizer: instead of the task's own; its squared errors are taken anew, from what the engine will read.
    """
    entry, source = task.entry, task.entry.source
    if _is_there(task):
        assert task.found is not None
        return task.found
    if isinstance(source, str):
        return _written(task, kept_pieces(checkpoint, task.engine, source, entry.form))
    kept = None if task.shared is None or quantizer is not None else _shared_name(task.shared, task)
    if kept is not None and (record := _kept_record(kept)) is not None:
        write_at(task.folder, entry.places, PlainFile(kept).chunks(0, kept.stat().st_size))
        return record
    data, relative_error = _made(checkpoint, task, quantizer)
    record = _written(task, data, relative_error)
    if kept is not None:
        _keep(kept, data, record)
    return record


def _is_there(task: StoreTask) -> bool:
    """Whether what an interrupted run has noted is at its places."""
    return task.found is not None and checksum(pieces_at(task.folder, task.entry.places)) == task.found.blake2b


def _made(checkpoint: Checkpoint, task: StoreTask, quantizer: Rounder | None = None) -> tuple[list[memoryview], float]:
    """The bytes of a quantized matrix, and its relative error."""
    entry, source = task.entry, task.entry.source
    assert entry.choice is not None and isinstance(source, MatrixRef)  # a matrix always has one
    if quantizer is None and task.quantizer == CUTS and (found := _cut(checkpoint, task)) is not None:
        block, relative_error = found
        return [_bytes_of(block)], relative_error
    writer, own = profile(task.engine).writer, rounder_of(task.quantizer, task.importance)
    weight = writer.convert(checkpoint.read(source), entry.form, checkpoint)
    tensors, error = _quantized(weight, entry.choice, entry.name, writer, quantizer or own)
    if quantizer is not None and not entry.choice.kept:
        error = squared_error_of(writer.reader(tensors, entry.choice, source.shape, entry.name), weight)
    return [_bytes_of(tensor) for tensor in tensors], _relative(error, weight)


def _cut(checkpoint: Checkpoint, task: StoreTask | CheckTask) -> tuple[torch.Tensor, float] | None:
    """The native block of a matrix whose codes the checkpoint holds, and its relative error; None where weights are
    needed."""
    entry = task.entry
    assert entry is not None and entry.choice is not None and isinstance(entry.source, MatrixRef)  # the callers know
    held = held_form(checkpoint, entry.source) if task.engine == "native" else None
    if held is None or not can_cut(held.choice, entry.choice):
        return None
    matrix, energy = cut(held, entry.choice)
    error = matrix.squared_error or 0.0
    return encode(matrix), error / energy if energy else error


def _keep(kept: Path, data: Sequence[memoryview], record: Record) -> None:
    kept.write_bytes(b"".join(data))
    # Last: it vouches for the data.
    kept.with_suffix(".json").write_text(record.model_dump_json(), encoding="utf-8")


@dataclass(frozen=True)
class Made:
    """A quantized matrix on its way to who writes it. Arrays: those travel without being copied."""

    data: tuple[np.ndarray, ...]
    relative_error: float


def make(checkpoint: Checkpoint, task: StoreTask) -> Made:
    """`store` on a machine that does not have the folder."""
    data, relative_error = _made(checkpoint, task)
    return Made(tuple(np.frombuffer(piece, np.uint8) for piece in data), relative_error)


def stored(workers: Workers, tasks: Sequence[StoreTask], expected: Iterable[StoreTask]) -> Iterator[Record]:
    """Make the entries and put them at their places; manifest entries in order.

    Where the workers do not have the folder, matrices are made there and written here, and kept tensors, which are
    only copied, are copied here. expected: the same tasks, announced to whoever reads ahead.
    """
    if not tasks or workers.shares(tasks[0].folder):
        yield from workers.map(store, expected, lambda task: task.nbytes)
        return
    checkpoint: Checkpoint = workers.shared

    def here(task: StoreTask) -> tuple[Record] | None:
        taken = task.shared is not None and _kept_record(_shared_name(task.shared, task)) is not None
        return (store(checkpoint, task),) if taken or isinstance(task.entry.source, str) or _is_there(task) else None

    for task, own, made in _partly_here(workers, make, tasks, here, lambda task: replace(task, shared=None)):
        if own is not None:
            yield own[0]
            continue
        data = [piece.data for piece in made.data]
        record = _written(task, data, made.relative_error)
        if task.shared is not None:
            _keep(_shared_name(task.shared, task), data, record)
        yield record


def _partly_here(
    workers: Workers,
    function: Callable[[Any, S], T],
    tasks: Iterable[S],
    here: Callable[[S], tuple[Any] | None],
    sent: Callable[[S], S],
) -> Iterator[tuple[S, tuple[Any] | None, T]]:
    """The tasks in order, each with what `here` makes of it or, where that is None, with what a worker does.

    sent: a task as it is sent away.
    """
    order: deque[tuple[S, tuple[Any] | None]] = deque()

    def away() -> Iterator[S]:
        for task in tasks:
            own = here(task)
            order.append((task, own))
            if own is None:
                yield sent(task)

    nothing: Any = None
    for result in workers.map(function, away(), lambda task: task.nbytes):  # type: ignore[attr-defined]
        while order[0][1] is not None:
            yield *order.popleft(), nothing
        yield *order.popleft(), result
    while order:
        yield *order.popleft(), nothing


def _written(task: StoreTask, data: Iterable[memoryview], relative_error: float | None = None) -> Record:
    """Put an entry's bytes at its places; returns its manifest entry."""
    entry = task.entry
    return Record(
        blake2b=write_at(task.folder, entry.places, data),
        relative_error=relative_error,
        parts=None if entry.parts == ((entry.name, None),) else entry.parts,
    )


def kept_pieces(checkpoint: Checkpoint, engine: str, tensor: str, form: Form) -> Iterator[memoryview]:
    """The bytes to store for a tensor that is kept: its own, unless they are encoded or the engine wants others."""
    shard = checkpoint.shard_of[tensor]
    info = checkpoint.shards[shard][tensor]
    if not form.raw and (form.changes or info.encoding is not None):
        return iter([_bytes_of(profile(engine).writer.convert(checkpoint.tensor(tensor), form, checkpoint))])
    return checkpoint.file(shard).chunks(info.begin, info.nbytes)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return flat(tensor.contiguous()).view(np.uint8).data


def _shared_name(folder: Path, task: StoreTask) -> Path:
    given = f"{task.entry.name} {task.entry.choice} {task.quantizer}"
    return folder / f"{hashlib.sha256(given.encode()).hexdigest()[:32]}.block"


def _kept_record(kept: Path) -> Record | None:
    """The record of a shared block, or None if it is not there or damaged."""
    try:
        record = Record.model_validate_json(kept.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    found = PlainFile(kept)
    return record if checksum(found.chunks(0, kept.stat().st_size)) == record.blake2b else None


def _quantized(
    weight: torch.Tensor, choice: Choice, name: str, writer: Export, quantizer: Rounder
) -> tuple[Sequence[torch.Tensor], float]:
    """The tensors to store and their Σ(w − ŵ)²."""
    if choice.kept:
        kept = sixteen_bits(weight)
        error = squared_distance(weight, kept)
        if not math.isfinite(error):
            if torch.isfinite(weight).all():
                raise QuantizationError(f"{name} holds weights too large for {kept.dtype}. Give it fewer bits than 16.")
            raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")
        return (kept,), error
    matrix = quantizer(weight, choice, name)
    assert matrix.squared_error is not None
    return writer.encode(matrix), matrix.squared_error


def _relative(error: float, weight: torch.Tensor) -> float:
    """Σ(w − ŵ)² / Σw², 0 for a matrix of zeros that is restored exactly."""
    energy = squared_norm(weight)
    return error / energy if energy else error


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
        return None if self.entry is None else _tensor_of(self.entry)

    def pieces(self) -> Iterator[memoryview]:
        """What was written."""
        return pieces_at(self.folder, self.places) if self.data is None else iter([one.data for one in self.data])

    def parts(self) -> list[torch.Tensor]:
        """What was written, as the tensors it is."""
        if self.data is not None:
            raw = [torch.from_numpy(one.copy()) for one in self.data]  # what has travelled cannot be written to
        else:
            raw = [PlainFile(self.folder / place.file).read(place.begin, place.nbytes) for place in self.places]
        return [stored.typed(one) for stored, one in zip(self.stored, raw, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes held while the task runs."""
        return CHUNK_BYTES if self.entry is None else _held_bytes(self.entry)


def _decoded(stored: Stored, values: torch.Tensor, name: str) -> tuple[Stored, torch.Tensor]:
    """A stored tensor and its values, decoded if they are coded. Raises CheckpointError naming it if it is damaged."""
    if not is_coded(values):
        return stored, values
    values = decode_tensor(values, name)
    return replace(stored, dtype=DTYPE_NAMES[values.dtype], shape=tuple(values.shape)), values.reshape(-1)


def checked(workers: Workers, tasks: Sequence[CheckTask]) -> Iterator[str | None]:
    """`check` of each task in order; where the workers do not have the folder, they are sent what was written."""
    if not tasks or workers.shares(tasks[0].folder):
        yield from workers.map(check, tasks, lambda task: task.nbytes)
        return
    source: Checkpoint | None = workers.shared

    def here(task: CheckTask) -> tuple[str | None] | None:
        return (check(source, task),) if task.choice is None or task.entry is None else None

    def sent(task: CheckTask) -> CheckTask:
        files = (PlainFile(task.folder / place.file).read(place.begin, place.nbytes) for place in task.places)
        return replace(task, data=tuple(one.numpy() for one in files))

    for _, own, fault in _partly_here(workers, check, tasks, here, sent):
        yield fault if own is None else own[0]


def check(source: Checkpoint | None, task: CheckTask) -> str | None:
    """What is wrong with one written entry (checksum, form, choice, error against its source), or None."""
    if checksum(task.pieces()) != task.record.blake2b:
        return f"{task.name} does not have its checksum (the file is damaged)"
    if task.choice is None:
        if source is None or task.entry is None or not isinstance(task.entry.source, str):
            return None
        original = checksum(kept_pieces(source, task.engine, task.entry.source, task.entry.form))
        if original == task.record.blake2b:
            return None
        if task.engine == "native":  # it may be coded
            try:
                _, values = _decoded(task.stored[0], task.parts()[0], task.name)
            except CheckpointError as damaged:
                return str(damaged)
            if checksum([_bytes_of(values)]) == original:
                return None
        return f"{task.name} differs from its source"
    writer = profile(task.engine).writer
    try:
        found = [_decoded(*each, task.name) for each in zip(task.stored, task.parts(), strict=True)]
    except CheckpointError as damaged:
        return str(damaged)
    parts = [values for _, values in found]
    fault = writer.fault(task.name, task.choice, [stored for stored, _ in found], parts)
    if fault is not None or source is None or task.entry is None:
        return fault
    assert isinstance(task.entry.source, MatrixRef)
    if (own := _cut(source, task)) is not None and torch.equal(own[0], parts[0]):
        return _error_fault(task, own[1])
    weight = writer.convert(source.read(task.entry.source), task.entry.form, source)
    if task.choice.kept:
        error = squared_distance(weight, parts[0].view(weight.shape))
    else:
        try:
            error = squared_error_of(writer.reader(parts, task.choice, task.entry.source.shape, task.name), weight)
        except CheckpointError as damaged:
            return str(damaged)
    return _error_fault(task, _relative(error, weight))


def _error_fault(task: CheckTask, error: float) -> str | None:
    """What is wrong with a relative error, or None."""
    agreed = task.record.relative_error or 0.0
    if abs(error - agreed) > 1e-6 * (1 + agreed):
        return f"{task.name} has relative error {error:.3g} against its source, not {agreed:.3g}"
    return None
