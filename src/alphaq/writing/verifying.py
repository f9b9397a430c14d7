"""An output held against its plan and manifest, and against the source that it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.writer import Place
from alphaq.engines.export import Entry, Layout
from alphaq.engines.output import MANIFEST_NAME, Output, raise_faults
from alphaq.measuring.measurement import leaving
from alphaq.measuring.resources import USUAL, Resources
from alphaq.work.workers import Workers
from alphaq.writing.checking import CheckTask, checked
from alphaq.writing.planned import as_planned, plan_choices
from alphaq.writing.records import VerifyResult
from alphaq.writing.storing import source_tensor


def verify(folder: Path, source: Checkpoint | None = None, resources: Resources = USUAL) -> VerifyResult:
    """Re-read every tensor against plan and manifest; with the source, against its values too.

    Raises VerificationError naming the first fault.
    """
    output = Output(folder)
    raise_faults(folder, output.faults())
    source = None if source is None else as_planned(source, output.plan)
    entries = {} if source is None else _entries(output, source)
    tasks = [_task(output, name, entries.get(name)) for name in entries or output.manifest]
    workers = resources.workers or Workers(1, None) if source is None else resources.pool(source)
    faults: Iterable[str | None] = checked(workers, tasks)
    if source is not None:
        shards = (source.shard_of[source_tensor(entries[task.name])] for task in tasks)
        faults = leaving(zip(shards, faults, strict=True), source.forget)
    raise_faults(folder, [fault for fault in resources.wrap(faults, len(tasks), "verify") if fault is not None])
    return _summary(output, source is not None)


def _entries(output: Output, source: Checkpoint) -> Mapping[str, Entry]:
    """What the plan makes of the source, in the order of its files. Raises VerificationError if the output differs."""
    # What tells files apart by their header only, a folder's name say, is not compared; so any rule does here.
    unnamed = replace(source, pre_tokenizer=source.pre_tokenizer or "default")
    expected = output.profile.writer.layout(unnamed, plan_choices(output.plan, source))
    raise_faults(output.folder, [*_differences(output, expected)])
    return {entry.name: entry for entry in expected.entries}


def _task(output: Output, name: str, entry: Entry | None) -> CheckTask:
    return CheckTask(
        name,
        output.plan.engine,
        output.folder,
        output.manifest[name],
        output.choice(name) if entry is None else entry.choice,
        tuple(output.stored[tensor] for tensor, _ in output.parts(name)),
        output.places(name),
        entry,
    )


def _differences(output: Output, expected: Layout) -> Iterable[str]:
    """What is not where, or not of the form, that the plan makes of the source."""
    for entry in expected.entries:
        if entry.name not in output.manifest:
            yield f"{entry.name} is not in {MANIFEST_NAME}"
        elif output.parts(entry.name) != entry.parts or (
            not output.codec and _sizes(output.places(entry.name)) != _sizes(entry.places)
        ):
            tensors = [f"{one.dtype} {list(one.shape)}" for one in map(output.stored.get, dict(entry.parts)) if one]
            yield f"{entry.name} is {' and '.join(tensors)}, which is not what the plan makes of the source"
    extra = output.manifest.keys() - {entry.name for entry in expected.entries}
    yield from (f"{name} is not of the source" for name in sorted(extra))


def _sizes(places: Iterable[Place]) -> list[int]:
    return [place.nbytes for place in places]


def _summary(output: Output, against_source: bool) -> VerifyResult:
    """Errors as the manifest has them, which were just confirmed."""
    errors = [one.relative_error for one in output.manifest.values() if one.relative_error is not None]
    expected = output.plan.expected_error
    planned = [output.manifest[name].relative_error or 0.0 for name in expected]
    return VerifyResult(
        tensors=len(output.manifest),
        quantized=len(output.plan.choices),
        against_source=against_source,
        mean_relative_error=sum(errors) / len(errors) if errors else 0.0,
        max_relative_error=max(errors, default=0.0),
        mean_relative_error_planned=sum(planned) / len(planned) if planned else None,
        mean_relative_error_expected=sum(expected.values()) / len(expected) if expected else None,
    )
