"""A plan carried out: tasks from the checkpoint, stored in a sink, checked, and published as one folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import alphaq
from alphaq.checkpoint.ranges import expect
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.checkpoint.writer import resumable_folder
from alphaq.engines.export import Export, Layout
from alphaq.engines.importance import Importance
from alphaq.engines.output import Record, header_of, write_manifest
from alphaq.engines.profiles import profile
from alphaq.measuring.measurement import ahead, leaving
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.plan import Plan
from alphaq.work.journal import Journal
from alphaq.writing.coded import laid_out, spec_at
from alphaq.writing.planned import as_planned, check_importance, check_size, check_source, plan_choices
from alphaq.writing.records import AS_USUAL, QuantizeResult, WriteOptions
from alphaq.writing.refining import store_by_inputs
from alphaq.writing.rounding import Rounding, check_codable
from alphaq.writing.sinks import Coded, InPlace, Sink
from alphaq.writing.storing import StoreTask, Written, stored
from alphaq.writing.verifying import verify


@dataclass(frozen=True)
class _Job:
    """What is to be written. layout: of plain files; those of a coded output are known when all is coded."""

    checkpoint: Checkpoint
    plan: Plan
    rounding: Rounding
    layout: Layout
    importance: Importance
    codec: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: Plan, options: WriteOptions) -> _Job:
        """Everything that can be refused is refused here. Raises PlanError."""
        rounding = options.rounding or Rounding.of(plan.engine)
        codec = plan.codec
        if codec is not None:
            check_codable(rounding, plan.engine)
            rounding = replace(rounding, coded=rounding.by_inputs is not None)
        check_source(checkpoint, plan.engine)
        choices = plan_choices(plan, checkpoint)
        check_importance(plan, options.imatrix)
        importance = profile(plan.engine).importance_of(checkpoint, options.imatrix)
        layout = profile(plan.engine).writer.laid_out(checkpoint, choices, plan.split_bytes)
        if codec is None:
            check_size(plan, layout.size_bytes)
            plan = plan.model_copy(update={"size_bytes": layout.size_bytes})
        plan = plan.model_copy(update={"source": checkpoint.identity})
        return cls(checkpoint, plan, rounding, layout, importance, codec)

    @property
    def writer(self) -> Export:
        """Of the plan's engine."""
        return profile(self.plan.engine).writer

    def depends_on(self, hash_contents: bool) -> dict[str, str]:
        """What the output depends on: an unfinished run is gone on with where all of it is the same."""
        facts = {
            "checkpoint": f"{self.checkpoint.fingerprint} {self.checkpoint.contents(hash_contents)}",
            "plan": hashlib.sha256(self.plan.to_json().encode()).hexdigest(),
            "alphaq version": alphaq.__version__,
            "quantizer": str(self.rounding),
        }
        if self.rounding.by_inputs is not None:
            facts["model settings"] = self.checkpoint.settings_digest()
        return facts

    def sink(self, folder: Path) -> Sink:
        """Where entries go."""
        if self.codec is None:
            return InPlace.open(folder, self.layout)
        return Coded.open(folder, self.layout, self.codec, self.plan.size_bytes)

    def tasks(self, sink: Sink, earlier: Mapping[str, Written], shared: Path | None) -> list[StoreTask]:
        """One for each entry. earlier: what an interrupted run has written."""
        specs = laid_out(self.layout) if self.rounding.by_inputs is not None else {}
        own = (
            StoreTask(
                entry,
                self.plan.engine,
                Path(),
                self.rounding.plain,
                tuple(spec_at(specs[tensor], index) for tensor, index in entry.parts) if specs else (),
                earlier=earlier.get(entry.name),
                shared=shared,
                importance=self.importance.columns.get(entry.name),
            )
            for entry in self.layout.entries
        )
        return [sink.task(task) for task in own]


def quantize(
    checkpoint: Checkpoint, plan: Plan, out: Path, options: WriteOptions = AS_USUAL, resources: Resources = USUAL
) -> QuantizeResult:
    """Quantize by a plan, write what its engine loads, re-read it against the source, then publish it.

    `out` appears complete or not at all; an interrupted run goes on where it was when it is started again with the same
    checkpoint and plan. Raises OutputError if they differ, unless told to restart; PlanError if plan, checkpoint and
    engine do not fit together; VerificationError if what was written is not what it should be.
    """
    checkpoint = as_planned(checkpoint, plan)
    job = _Job.of(checkpoint, plan, options)
    with resumable_folder(out, job.depends_on(options.hash_contents), options.restart) as (folder, journal):
        sink = job.sink(folder)
        notes = _Notes(journal)
        tasks = job.tasks(sink, notes.earlier(), None if checkpoint.dropped else options.shared)
        tasks, unseen = _refined(job, tasks, notes, resources)
        written = _stored(job, tasks, notes, resources)
        layout = sink.finish(written)
        _finish(job, sink, layout, {name: one.record for name, one in written.items()}, folder)
        verified = verify(folder, checkpoint, resources) if options.check else None
        checkpoint.require_unchanged()
    return QuantizeResult(
        out=str(out),
        files=tuple(str(out / file) for file in layout.files),
        size_bytes=layout.size_bytes,
        source_bytes=checkpoint.nbytes,
        quantizer=job.rounding.name,
        not_calibrated=unseen,
        notes=tuple(job.writer.side_notes(checkpoint)),
        codec=job.codec,
        verified=verified,
    )


class _Note(BaseModel):
    """A line of an unfinished run's journal: what was written of an entry."""

    model_config = ConfigDict(frozen=True)

    name: str
    record: Record
    coded: tuple[str, tuple[int, ...]] | None = None
    """Dtype and shape, if it was coded."""


class _Notes:
    """What an unfinished run keeps of the entries that it has written."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def earlier(self) -> dict[str, Written]:
        """What was noted before, by entry."""
        notes = [_Note.model_validate(line) for line in self._journal.entries if "record" in line]
        return {one.name: Written(one.record, None if one.coded is None else TensorSpec(*one.coded)) for one in notes}

    def add(self, task: StoreTask, written: Written) -> None:
        """Note an entry, unless it was there."""
        if written == task.earlier:
            return
        coded = None if written.coded is None else (written.coded.dtype, written.coded.shape)
        note = _Note(name=task.entry.name, record=written.record, coded=coded)
        self._journal.append(note.model_dump(exclude_none=True))


def _refined(
    job: _Job, tasks: list[StoreTask], notes: _Notes, resources: Resources
) -> tuple[list[StoreTask], dict[str, str]]:
    """The tasks with what was written by looking at inputs; which matrices were rounded without them, and why."""
    if job.rounding.by_inputs is None:
        return tasks, {}
    rounded = (task.entry for task in tasks if task.entry.choice is not None and not task.entry.choice.kept)
    waiting = {entry.name for entry in rounded}
    bar = iter(resources.wrap(range(len(waiting)), len(waiting), f"quantize ({job.rounding.name})"))
    seen: dict[str, Written] = {}

    def keep(task: StoreTask, written: Written) -> None:
        next(bar, None)
        seen[task.entry.name] = written
        notes.add(task, written)

    unseen = store_by_inputs(job.checkpoint, tasks, job.rounding, keep)
    for _ in bar:  # which ends it
        pass
    for name in waiting - seen.keys():
        unseen[name] = "its inputs are not seen where the model's class computes with it"
    return [replace(task, earlier=seen.get(task.entry.name, task.earlier)) for task in tasks], unseen


def _stored(job: _Job, tasks: list[StoreTask], notes: _Notes, resources: Resources) -> dict[str, Written]:
    """What was written, by entry, in the order of the source's files."""
    checkpoint, workers = job.checkpoint, resources.pool(job.checkpoint)
    expected = tasks if workers.cluster else ahead(tasks, partial(_expect, checkpoint))
    shards = (checkpoint.shard_of[task.tensor] for task in tasks)
    results = leaving(zip(shards, stored(workers, tasks, expected), strict=True), checkpoint.forget)
    written = {}
    for task, one in zip(tasks, resources.wrap(results, len(tasks), "quantize"), strict=True):
        written[task.entry.name] = one
        notes.add(task, one)
    return written


def _expect(checkpoint: Checkpoint, task: StoreTask) -> None:
    if isinstance(task.entry.source, MatrixRef):
        expect(checkpoint, task.entry.source)


def _finish(job: _Job, sink: Sink, layout: Layout, records: Mapping[str, Record], folder: Path) -> None:
    """What lies beside the weight files."""
    plan = job.plan.model_copy(update={"size_bytes": layout.size_bytes})
    job.writer.write_rest(folder, job.checkpoint, plan, layout)
    sink.describe()
    headers = {file: header_of(header) for file, (header, _) in layout.files.items()}
    options = job.rounding.options(plan.engine, job.checkpoint.pre_tokenizer)
    write_manifest(folder, plan, records, headers, options)
