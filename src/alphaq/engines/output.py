"""What lies beside the weight files of every engine: the plan, and a manifest of what was written.

The manifest holds, for every matrix and every kept tensor, where it went, a checksum, and the relative squared
error if it was quantized, so that `verify` can tell damage from the loss that was agreed to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, field_validator

from alphaq.checkpoint.writer import Place, checksum, pieces_at
from alphaq.engines.export import Stored
from alphaq.engines.profiles import profile
from alphaq.errors import CheckpointError, VerificationError
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan, first_fault
from alphaq.quantizers.base import FORMERLY
from alphaq.work.untrusted import read_bounded

PLAN_NAME = "plan.json"
MANIFEST_NAME = "alphaq_manifest.json"


FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.\-]*$")]


class Record(BaseModel):
    """A manifest entry: checksum of the bytes in the order of the parts, and Σ(w − ŵ)²/Σw² if it was quantized.

    parts: output tensors, each with its place in a stack or None; a single tensor of the entry's own name is left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    blake2b: str
    relative_error: float | None = None
    parts: tuple[tuple[str, int | None], ...] | None = None


class QuantizeOptions(BaseModel):
    """What `alphaq quantize` was told beyond the plan, by its options' names; None is the usual."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantizer: str | None = None
    calibration: str | None = None
    """Name of the text that the quantizer looked at, or what stood for one."""
    calibration_tokens: int | None = None
    pre_tokenizer: str | None = None

    @field_validator("quantizer")
    @classmethod
    def _todays_name(cls, name: str | None) -> str | None:
        """Manifests of before name quantizers as they were called then."""
        return None if name is None else FORMERLY.get(name, name)


NO_OPTIONS = QuantizeOptions()


class Manifest(BaseModel):
    """What `alphaq_manifest.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    headers: dict[FileName, tuple[NonNegativeInt, str]] = Field(default_factory=dict)
    """Length and checksum of what each weight file begins with, up to its tensors."""
    options: QuantizeOptions | None = None
    """None if there were none."""
    tensors: dict[str, Record]


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError naming the first fault."""
    try:
        return Manifest.model_validate_json(read_bounded(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Copy the files again.") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({first_fault(error)}). Copy the files again, or quantize again."
        ) from None


def header_of(header: bytes) -> tuple[int, str]:
    """A file's header as the manifest has it."""
    return len(header), checksum([memoryview(header)])


def write_manifest(
    folder: Path,
    plan: Plan,
    manifest: Mapping[str, Record],
    headers: Mapping[str, tuple[int, str]],
    options: QuantizeOptions = NO_OPTIONS,
) -> None:
    """Plan and manifest."""
    told = options if options != NO_OPTIONS else None
    whole = Manifest(headers=dict(headers), options=told, tensors=dict(sorted(manifest.items())))
    (folder / MANIFEST_NAME).write_text(whole.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")
    (folder / PLAN_NAME).write_text(plan.to_json(), encoding="utf-8")


class Output:
    """What `alphaq quantize` wrote, opened for reading: plan, manifest, and every tensor's place."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"No folder {folder}. Point to the output of `alphaq quantize`.")
        for name in (PLAN_NAME, MANIFEST_NAME):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder} is not a complete alphaq checkpoint: it has no {name}. Point to the output of "
                    "`alphaq quantize`, complete the copy, or quantize again."
                )
        self.folder = folder
        self.plan = Plan.read(folder / PLAN_NAME)
        self.profile = profile(self.plan.engine)
        manifest = read_manifest(folder / MANIFEST_NAME)
        self.manifest, self.headers = manifest.tensors, manifest.headers
        self.options = manifest.options or NO_OPTIONS
        self.stored: dict[str, Stored] = self.profile.writer.stored(folder)

    @property
    def codec(self) -> str | None:
        """What its tensors are coded with, where that makes them smaller; None if they are not."""
        return self.plan.codec

    def parts(self, name: str) -> tuple[tuple[str, int | None], ...]:
        """Output tensors of one entry."""
        return self.manifest[name].parts or ((name, None),)

    def places(self, name: str) -> tuple[Place, ...]:
        """Where one entry's bytes are. The entry must be complete (see `faults`)."""
        return tuple(self.stored[tensor].share(index) for tensor, index in self.parts(name))

    def choice(self, name: str) -> Choice | None:
        """The plan's choice for one entry, None for a tensor that is kept."""
        return self.plan.choice(name) if name in self.plan.choices else None

    def faults(self) -> list[str]:
        """What shows without reading data: missing or unexplained tensors, and a total size other than promised."""
        expected = {tensor for name in self.manifest for tensor, _ in self.parts(name)}
        faults = [f"{name} is missing" for name in sorted(expected - self.stored.keys())]
        for file, (nbytes, digest) in self.headers.items():
            if not (self.folder / file).is_file():
                faults.append(f"{file} is missing")
            elif checksum(pieces_at(self.folder, [Place(file, 0, nbytes)])) != digest:
                faults.append(
                    f"the header of {file} is not the one that was written (metadata or tensors were changed)"
                )
        faults += [f"{name} is missing" for name in sorted(self.plan.choices.keys() - self.manifest.keys())]
        faults += [f"{name} is not in {MANIFEST_NAME}" for name in sorted(self.stored.keys() - expected)]
        for name in self.manifest:
            for tensor, index in self.parts(name):
                if index is not None and tensor in self.stored:
                    shape = self.stored[tensor].shape
                    if not shape or not 0 <= index < shape[0]:
                        faults.append(f"{tensor} of shape {list(shape)} has no entry {index}")
        real = sum((self.folder / file).stat().st_size for file in {one.place.file for one in self.stored.values()})
        if self.plan.size_bytes is not None and real != self.plan.size_bytes:
            faults.append(f"the weight files have {real} bytes, the plan promises {self.plan.size_bytes}")
        return faults


def raise_faults(folder: Path, faults: list[str]) -> None:
    """VerificationError with the first fault and the count, if there is any."""
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise VerificationError(f"{folder}: {faults[0]}{more}. Copy the files again, or quantize again.")
