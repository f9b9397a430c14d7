"""The stage that packs a native checkpoint's tensors with an entropy coder, or unpacks them: the same weights.

Every tensor is coded by itself and checked at once; those that would not become smaller stay as they are. What is coded
waits in a file beside the output, because a shard's header comes first and says how long everything is. Peak memory is
one tensor for each worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch

from alphaq.checkpoint.files import CHUNK_BYTES, PlainFile, check_link, is_file
from alphaq.checkpoint.safetensors_format import DTYPE_NAMES, TensorSpec, layout
from alphaq.checkpoint.side_files import files_below
from alphaq.checkpoint.weights import INDEX_NAME
from alphaq.checkpoint.writer import atomic_folder, checksum, copy_file, create_file, write_at
from alphaq.engines.export import Stored, stored_in, write_json
from alphaq.engines.output import MANIFEST_NAME, PLAN_NAME, Output, Record, header_of, raise_faults, write_manifest
from alphaq.errors import PlanError, VerificationError
from alphaq.formats.coding import decode_tensor, encode_tensor
from alphaq.formats.versions import CODECS, CODED_FORMAT_VERSION, NATIVE_FORMAT_VERSION
from alphaq.nouns.fidelity import CERTIFICATE_NAME
from alphaq.work.untrusted import parse_json, read_bounded
from alphaq.work.workers import Workers, Wrap, silent


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


def recoded(_: Any, task: RecodeTask) -> torch.Tensor:
    """The tensor as the codec stores it. Raises VerificationError or CheckpointError naming it if it is damaged."""
    place = task.stored.place
    raw = PlainFile(task.folder / place.file).read(place.begin, place.nbytes)
    if checksum([raw.numpy().data]) != task.blake2b:
        raise VerificationError(f"{task.name} does not have its checksum. Copy {place.file} again, or quantize again.")
    held = task.stored.typed(raw)
    plain = decode_tensor(held.view(task.stored.shape), task.name)
    if task.codec == CODECS[0]:
        return plain
    coded = encode_tensor(plain)
    if not torch.equal(_bytes(decode_tensor(coded, task.name)), _bytes(plain)):
        raise VerificationError(
            f"{task.name} is not the same after {task.codec}. Report this, with the zstandard version."
        )
    return coded


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def recode(folder: Path, out: Path, codec: str, wrap: Wrap = silent, workers: Workers | None = None) -> dict[str, Any]:
    """Write the native checkpoint `folder` again with its tensors coded by `codec`, one of CODECS; returns sizes.

    `out` appears complete or not at all. Raises PlanError if the files are another engine's, VerificationError or
    CheckpointError by name if a tensor is damaged.
    """
    with atomic_folder(out) as made:
        return recode_into(folder, made, codec, wrap, workers) | {"out": str(out)}


def recode_into(folder: Path, made: Path, codec: str, wrap: Wrap, workers: Workers | None) -> dict[str, Any]:
    """`recode` into a folder that is there; what an interrupted run has left in it is written over."""
    opened = Output(folder)
    if opened.plan.engine != "native":
        raise PlanError(
            f"{folder} is for {opened.plan.engine}, which reads no coded tensors. Only native checkpoints can be coded."
        )
    raise_faults(folder, opened.faults())
    files: dict[str, list[str]] = {}
    for name, stored in opened.stored.items():
        files.setdefault(stored.place.file, []).append(name)
    tasks = (
        RecodeTask(name, folder, opened.stored[name], opened.manifest[name].blake2b, codec)
        for names in files.values()
        for name in names
    )
    results = (workers or Workers(1, None)).map(recoded, tasks, lambda task: task.nbytes)
    coded = iter(wrap(results, len(opened.stored), "code" if codec != CODECS[0] else "decode"))
    manifest: dict[str, Record] = {}
    headers, total, weight_map = {}, 0, {}
    for file, names in files.items():
        with TemporaryFile(dir=made) as waiting:
            specs = {name: _spooled(next(coded), waiting) for name in names}
            header, infos, nbytes = layout(specs)
            create_file(made / file, header, nbytes)
            places = stored_in({file: infos})
            waiting.seek(0)
            for name in names:
                place = places[name].place
                digest = write_at(made, [place], _pieces(waiting, place.nbytes))
                manifest[name] = opened.manifest[name].model_copy(update={"blake2b": digest})
                weight_map[name] = file
        headers[file] = header_of(header)
        total += nbytes
    plan = opened.plan.coded_by(codec).model_copy(update={"size_bytes": total})
    config = parse_json(read_bounded(folder / "config.json"))
    quantization = {key: value for key, value in config["quantization_config"].items() if key != "codec"}
    quantization["format_version"] = NATIVE_FORMAT_VERSION if codec == CODECS[0] else CODED_FORMAT_VERSION
    config["quantization_config"] = quantization | ({} if codec == CODECS[0] else {"codec": codec})
    write_json(made / "config.json", config)
    data = total - sum(length for length, _ in headers.values())
    write_json(made / INDEX_NAME, {"metadata": {"total_size": data}, "weight_map": dict(sorted(weight_map.items()))})
    own = {*files, "config.json", INDEX_NAME, PLAN_NAME, MANIFEST_NAME, CERTIFICATE_NAME}
    for name in sorted(name for name in files_below(folder) if name not in own and is_file(folder / name)):
        check_link(folder / name, folder)
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / name, made / name)
    write_manifest(made, plan, manifest, headers, opened.options)
    before = sum((folder / file).stat().st_size for file in files)
    return {"codec": codec, "size_bytes": total, "source_bytes": before, "tensors": len(manifest)}


def _spooled(tensor: torch.Tensor, waiting: IO[bytes]) -> TensorSpec:
    waiting.write(_bytes(tensor).numpy().data)
    return TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def _pieces(waiting: IO[bytes], nbytes: int) -> Iterator[memoryview]:
    for begin in range(0, nbytes, CHUNK_BYTES):
        yield memoryview(waiting.read(min(CHUNK_BYTES, nbytes - begin)))
