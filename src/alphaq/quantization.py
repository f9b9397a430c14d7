"""The stage between a plan and files: one task per output tensor, each needing only its own source in memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from alphaq.checkpoint.files import CHUNK_BYTES, PlainFile
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorInfo, TensorSpec
from alphaq.checkpoint.writer import checksum, write_at
from alphaq.engines.native_files import TensorRecord, fault_of, restore
from alphaq.errors import PlanError, QuantizationError
from alphaq.numerics import squared_distance, squared_norm
from alphaq.quantizers.base import QUANTIZERS, sixteen_bits
from alphaq.quantizers.packing import decode, encode, restored_error
from alphaq.records import Choice, MatrixRef, Plan, Role
from alphaq.simd import flat


def plan_choices(plan: Plan, checkpoint: Checkpoint) -> dict[str, Choice]:
    """The plan's choices, checked against the checkpoint it is to be used on.

    Raises PlanError if it was made for other weights, names a matrix that is not there, or leaves an
    expert out.
    """
    if plan.source is not None and plan.source.fingerprint != checkpoint.fingerprint:
        raise PlanError(
            f"The plan was made for {plan.source.name!r} with other weight files than {checkpoint.name!r}. "
            "Make a new plan for this checkpoint."
        )
    known = {matrix.name for matrix in checkpoint.matrices}
    choices = {name: plan.choice(name) for name in plan.choices}
    for name in choices:
        if name not in known:
            raise PlanError(f"The plan names {name!r}, which {checkpoint.name} does not have. Make a new plan for it.")
    forgotten = [matrix.name for matrix in checkpoint.with_role(Role.EXPERT) if matrix.name not in choices]
    if forgotten:
        raise PlanError(
            f"The plan leaves out {len(forgotten)} expert matrices, first {forgotten[0]!r}. "
            "Give each a choice; '16' keeps a matrix as it is."
        )
    return choices


@dataclass(frozen=True)
class StoreTask:
    """One output tensor to make: a matrix by its choice, or a stored tensor kept as it is."""

    source: MatrixRef | str
    choice: Choice | None
    path: Path
    place: TensorInfo
    found: TensorRecord | None = None
    """What an interrupted run has noted of it."""
    shared: Path | None = None
    """Folder of quantized matrices that several runs on the same checkpoint share."""

    @property
    def nbytes(self) -> int:
        """Bytes of source held while the task runs."""
        return CHUNK_BYTES if isinstance(self.source, str) else 2 * self.source.parameters


def store_tasks(
    checkpoint: Checkpoint,
    choices: Mapping[str, Choice],
    folder: Path,
    places: Mapping[str, Mapping[str, TensorInfo]],
    done: Mapping[str, TensorRecord],
    shared: Path | None = None,
) -> Iterator[tuple[str, StoreTask]]:
    """Every output tensor in the order of the source files, with its source shard; fused tensors come apart."""
    within = checkpoint.matrices_by_tensor(choices)
    for (shard, tensors), (output, infos) in zip(checkpoint.shards.items(), places.items(), strict=True):
        for stored in tensors:
            for source in within.get(stored, [stored]):
                name = source if isinstance(source, str) else source.name
                yield shard, StoreTask(source, choices.get(name), folder / output, infos[name], done.get(name), shared)


def store(checkpoint: Checkpoint, task: StoreTask) -> TensorRecord:
    """Quantize one matrix and put it at its place, unless it is there already; returns its manifest entry."""
    if task.found is not None:
        there = PlainFile(task.path).chunks(task.place.begin, task.place.nbytes)
        if checksum(there) == task.found.blake2b:
            return task.found
    if isinstance(task.source, str):
        shard = checkpoint.shard_of[task.source]
        info = checkpoint.shards[shard][task.source]
        pieces = checkpoint.file(shard).chunks(info.begin, info.nbytes)
        return TensorRecord(blake2b=write_at(task.path, task.place.begin, pieces))
    assert task.choice is not None  # a matrix always has one
    kept = None if task.shared is None else _shared_name(task.shared, task.source.name, task.choice)
    if kept is not None and (record := _kept_record(kept)) is not None:
        write_at(task.path, task.place.begin, PlainFile(kept).chunks(0, task.place.nbytes))
        return record
    weight = checkpoint.read(task.source)
    stored, error = _quantized(weight, task.choice, task.source.name)
    data = flat(stored).view(np.uint8).data
    record = TensorRecord(
        blake2b=write_at(task.path, task.place.begin, [data]), relative_error=_relative(error, weight)
    )
    if kept is not None:
        kept.write_bytes(data)
        kept.with_suffix(".json").write_text(
            record.model_dump_json(), encoding="utf-8"
        )  # last: it vouches for the data
    return record


def _shared_name(folder: Path, name: str, choice: Choice) -> Path:
    return folder / f"{hashlib.sha256(f'{name} {choice}'.encode()).hexdigest()[:32]}.block"


def _kept_record(kept: Path) -> TensorRecord | None:
    """The record of a shared block, or None if it is not there or damaged."""
    try:
        record = TensorRecord.model_validate_json(kept.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    found = PlainFile(kept)
    return record if checksum(found.chunks(0, kept.stat().st_size)) == record.blake2b else None


def _quantized(weight: torch.Tensor, choice: Choice, name: str) -> tuple[torch.Tensor, float]:
    """The tensor to store and its Σ(w − ŵ)²."""
    if choice.bits == 16:
        kept = sixteen_bits(weight)
        error = squared_distance(weight, kept)
        if not math.isfinite(error):
            raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")
        return kept, error
    matrix = QUANTIZERS["rtn"](weight, choice, name)
    assert matrix.squared_error is not None
    return encode(matrix), matrix.squared_error


def _relative(error: float, weight: torch.Tensor) -> float:
    """Σ(w − ŵ)² / Σw², 0 for a matrix of zeros that is restored exactly."""
    energy = squared_norm(weight)
    return error / energy if energy else error


@dataclass(frozen=True)
class CheckTask:
    """One written tensor to read again; `source` only if it is to be compared with the original."""

    info: TensorInfo
    path: Path
    record: TensorRecord
    choice: Choice | None
    source: MatrixRef | str | None = None
    expected: TensorSpec | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held while the task runs."""
        return CHUNK_BYTES if not isinstance(self.source, MatrixRef) else 2 * self.source.parameters


def check(source: Checkpoint | None, task: CheckTask) -> str | None:
    """What is wrong with one written tensor (checksum, shape, choice, error against its source), or None."""
    file, info = PlainFile(task.path), task.info
    if checksum(file.chunks(info.begin, info.nbytes)) != task.record.blake2b:
        return f"{info.name} does not have its checksum (the file is damaged)"
    if task.choice is None:
        if source is None or not isinstance(task.source, str):
            return None
        shard = source.shard_of[task.source]
        original = source.shards[shard][task.source]
        if checksum(source.file(shard).chunks(original.begin, original.nbytes)) != task.record.blake2b:
            return f"{info.name} differs from its source"
        return None
    raw = file.read(info.begin, info.nbytes)
    fault = fault_of(info, raw, task.choice, task.expected)
    if fault is not None or source is None or not isinstance(task.source, MatrixRef):
        return fault
    weight = source.read(task.source)
    if task.choice.bits == 16:
        error = squared_distance(weight, restore(info, raw, False))
    else:
        error = restored_error(decode(raw, info.name), weight)
    error, agreed = _relative(error, weight), task.record.relative_error or 0.0
    if abs(error - agreed) > 1e-6 * (1 + agreed):
        return f"{info.name} has relative error {error:.3g} against its source, not {agreed:.3g}"
    return None
