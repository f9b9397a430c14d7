"""A checkpoint without some of its experts, written as a model folder in 16 bits: nothing is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import alphaq
from alphaq.checkpoint.pruned import Dropped, without_experts
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.writer import checksum, pieces_at, resumable_folder
from alphaq.engines.export import write_json
from alphaq.engines.native import layout as mirrored
from alphaq.engines.safetensors.folder import write_model_folder
from alphaq.errors import VerificationError
from alphaq.measuring.measurement import leaving
from alphaq.measuring.resources import USUAL, Resources
from alphaq.writing.sinks import InPlace
from alphaq.writing.storing import StoreTask, stored

PRUNED_NAME = "alphaq_pruned.json"
"""Says what was dropped, beside config.json."""


@dataclass(frozen=True)
class Pruning:
    """What is to go. dropped: numbers of experts, by layer. bound: nats per token that they cost together, with 95 %;
    None where that was not measured. restart: whether to discard what an unfinished run left."""

    dropped: Dropped
    bound: float | None = None
    restart: bool = False


class PruneResult(BaseModel):
    """What was written. dropped: numbers of the experts that are gone, by layer. bound: what they cost together in nats
    per token, with 95 %, by the model's own writing; None where they were named by the user."""

    model_config = ConfigDict(frozen=True)

    out: str
    experts: int
    dropped: Mapping[int, tuple[int, ...]]
    bound: float | None
    size_bytes: int
    source_bytes: int


def prune(checkpoint: Checkpoint, wanted: Pruning, out: Path, resources: Resources = USUAL) -> PruneResult:
    """Write the checkpoint without these experts, re-read it, then publish it.

    `out` appears complete or not at all. Raises PlanError for experts that cannot be dropped, OutputError,
    VerificationError.
    """
    pruned = without_experts(checkpoint, wanted.dropped)
    planned = mirrored(pruned, {})
    facts = {"checkpoint": f"{pruned.fingerprint} {pruned.contents()}", "alphaq version": alphaq.__version__}
    workers = resources.pool(pruned)
    with resumable_folder(out, facts, wanted.restart) as (folder, _):
        sink = InPlace.open(folder, planned)
        tasks = [sink.task(StoreTask(entry, "native", Path(), "rtn")) for entry in planned.entries]
        shards = (pruned.shard_of[task.tensor] for task in tasks)
        written = leaving(zip(shards, stored(workers, tasks, tasks), strict=True), pruned.forget)
        for task, one in zip(tasks, resources.wrap(written, len(tasks), "prune"), strict=True):
            if checksum(pieces_at(folder, task.entry.places)) != one.record.blake2b:
                raise VerificationError(f"{task.entry.name} cannot be read back as written. Check the disk.")
        write_model_folder(folder, pruned, planned.entries, {})
        experts = pruned.architecture.experts_per_layer(pruned.config)
        told = {"source": checkpoint.name, "experts": experts, "bound": wanted.bound, "dropped": dict(pruned.dropped)}
        write_json(folder / PRUNED_NAME, told)
        open_checkpoint(folder)  # which counts experts, rows and what config.json promises
        checkpoint.require_unchanged()
    return PruneResult(
        out=str(out),
        experts=experts,
        dropped=pruned.dropped,
        bound=wanted.bound,
        size_bytes=planned.size_bytes,
        source_bytes=checkpoint.nbytes,
    )
