"""The stage that packs a native checkpoint's tensors with an entropy coder, or unpacks them: the same weights.

Every tensor is coded by itself and checked at once; those that would not become smaller stay as they are. Peak memory
is one tensor for each worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch

from alphaq.checkpoint.files import CHUNK_BYTES, PlainFile, check_link, is_file
from alphaq.checkpoint.side_files import files_below
from alphaq.checkpoint.weights import INDEX_NAME
from alphaq.checkpoint.writer import atomic_folder, checksum, copy_file, create_file, write_at
from alphaq.engines.export import Stored, write_json
from alphaq.engines.output import MANIFEST_NAME, PLAN_NAME, Output, Record, header_of, raise_faults, write_manifest
from alphaq.errors import PlanError, VerificationError
from alphaq.formats.coding import decode_tensor
from alphaq.formats.versions import CODECS
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.fidelity import CERTIFICATE_NAME
from alphaq.work.workers import Workers
from alphaq.writing.coded import CodedLayout, as_bytes, coded_tensor, say_codec, spec_of
from alphaq.writing.records import RecodeResult


@dataclass(frozen=True)
class RecodeTask:
    """One tensor of an output to code again."""

    name: str
    folder: Path
    stored: Stored
    blake2b: str
    codec: str

    @property
    def nbytes(self) -> int:
        """Bytes held while the task runs, if codes take a third of what they stand for at least."""
        return 4 * self.stored.place.nbytes


def recoded(_: object, task: RecodeTask) -> torch.Tensor:
    """The tensor as the codec stores it. Raises VerificationError or CheckpointError naming it if it is damaged."""
    place = task.stored.place
    raw = PlainFile(task.folder / place.file).read(place.begin, place.nbytes)
    if checksum([raw.numpy().data]) != task.blake2b:
        raise VerificationError(f"{task.name} does not have its checksum. Copy {place.file} again, or quantize again.")
    plain = decode_tensor(task.stored.typed(raw).view(task.stored.shape), task.name)
    return plain if task.codec == CODECS[0] else coded_tensor(plain, task.name)


def recode(folder: Path, out: Path, codec: str, resources: Resources = USUAL) -> RecodeResult:
    """Write the native checkpoint `folder` again with its tensors coded by `codec`, one of CODECS.

    `out` appears complete or not at all. Raises PlanError if the files are another engine's, VerificationError or
    CheckpointError by name if a tensor is damaged.
    """
    with atomic_folder(out) as made:
        output = Output(folder)
        if not output.profile.writer.codable:
            raise PlanError(
                f"{folder} is for {output.plan.engine}, which reads no coded tensors. Only native checkpoints can be "
                "coded."
            )
        raise_faults(folder, output.faults())
        coded, manifest = _weights(output, made, codec, resources)
        _copy_rest(folder, made, coded.files)
        _describe(output, made, coded, manifest, codec)
    before = sum((folder / file).stat().st_size for file in coded.files)
    return RecodeResult(
        codec=codec, size_bytes=coded.size_bytes, source_bytes=before, tensors=len(manifest), out=str(out)
    )


def _weights(output: Output, made: Path, codec: str, resources: Resources) -> tuple[CodedLayout, dict[str, Record]]:
    """Code every tensor and fill the files, one after the other; a file's tensors wait beside it until it is whole."""
    by_file: dict[str, list[str]] = {}
    for name, stored in output.stored.items():
        by_file.setdefault(stored.place.file, []).append(name)
    tasks = (
        RecodeTask(name, output.folder, output.stored[name], output.manifest[name].blake2b, codec)
        for names in by_file.values()
        for name in names
    )
    results = (resources.workers or Workers(1, None)).map(recoded, tasks, lambda task: task.nbytes)
    tensors = iter(resources.wrap(results, len(output.stored), "decode" if codec == CODECS[0] else "code"))
    whole, manifest = CodedLayout({}, {}), {}
    for file, names in by_file.items():
        with TemporaryFile(dir=made) as waiting:
            specs = {}
            for name in names:
                tensor = next(tensors)
                waiting.write(as_bytes(tensor).numpy().data)
                specs[name] = spec_of(tensor)
            own = CodedLayout.of({file: specs})
            create_file(made / file, *own.files[file])
            waiting.seek(0)
            for name in names:
                place = own.places[name].place
                digest = write_at(made, [place], _pieces(waiting, place.nbytes))
                manifest[name] = output.manifest[name].model_copy(update={"blake2b": digest})
        whole = CodedLayout(whole.files | own.files, whole.places | own.places)
    return whole, manifest


def _pieces(waiting: IO[bytes], nbytes: int) -> Iterator[memoryview]:
    for begin in range(0, nbytes, CHUNK_BYTES):
        yield memoryview(waiting.read(min(CHUNK_BYTES, nbytes - begin)))


def _copy_rest(folder: Path, made: Path, weights: Mapping[str, object]) -> None:
    """Whatever lies beside the weights and is not made anew."""
    own = {*weights, "config.json", INDEX_NAME, PLAN_NAME, MANIFEST_NAME, CERTIFICATE_NAME}
    for name in sorted(name for name in files_below(folder) if name not in own and is_file(folder / name)):
        check_link(folder / name, folder)
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / name, made / name)


def _describe(output: Output, made: Path, coded: CodedLayout, manifest: dict[str, Record], codec: str) -> None:
    """Config, index, plan and manifest."""
    say_codec(output.folder / "config.json", codec, made / "config.json")
    weight_map = {name: stored.place.file for name, stored in sorted(coded.places.items())}
    data = sum(stored.place.nbytes for stored in coded.places.values())
    write_json(made / INDEX_NAME, {"metadata": {"total_size": data}, "weight_map": weight_map})
    plan = output.plan.coded_by(codec).model_copy(update={"size_bytes": coded.size_bytes})
    headers = {file: header_of(header) for file, (header, _) in coded.files.items()}
    write_manifest(made, plan, manifest, headers, output.options)
