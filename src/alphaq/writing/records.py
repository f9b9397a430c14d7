"""What a run that writes is told, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.writing.rounding import Rounding

JsonObject = dict[str, object]
"""What `--json` prints."""


@dataclass(frozen=True)
class WriteOptions:
    """How a plan is carried out.

    rounding: the engine's usual one by default. imatrix: the one that the plan was made with. restart: discard an
    unfinished run instead of going on with it. hash_contents: recognise weights by their contents, not by when they
    were written. shared: a folder in which runs on the same checkpoint leave quantized matrices to one another. check:
    False leaves out the re-reading, for files that are only looked at once.
    """

    rounding: Rounding | None = None
    imatrix: ImportanceMatrix | None = None
    restart: bool = False
    hash_contents: bool = False
    shared: Path | None = None
    check: bool = True


AS_USUAL = WriteOptions()


class VerifyResult(BaseModel):
    """What re-reading found. Errors are Σ(w − ŵ)²/Σw²; of planned matrices also what the plan expected."""

    model_config = ConfigDict(frozen=True)

    tensors: int
    quantized: int
    against_source: bool
    mean_relative_error: float
    max_relative_error: float
    mean_relative_error_planned: float | None
    mean_relative_error_expected: float | None


class QuantizeResult(BaseModel):
    """What was written.

    not_calibrated: matrices that were rounded without their inputs, and why. codec: what codes the tensors, if they are
    coded. verified: None without the re-reading.
    """

    model_config = ConfigDict(frozen=True)

    out: str
    files: tuple[str, ...]
    size_bytes: int
    source_bytes: int
    quantizer: str
    not_calibrated: Mapping[str, str]
    notes: tuple[str, ...]
    codec: str | None = None
    verified: VerifyResult | None = None

    @property
    def tensors(self) -> int:
        """How many tensors were re-read."""
        return 0 if self.verified is None else self.verified.tensors

    def as_json(self) -> JsonObject:
        """One flat object; what does not apply is left out."""
        own = self.model_dump(exclude={"verified", "codec"})
        coded = {} if self.codec is None else {"codec": self.codec}
        return own | ({} if self.verified is None else self.verified.model_dump()) | coded


class RecodeResult(BaseModel):
    """What coding or decoding an output made of it."""

    model_config = ConfigDict(frozen=True)

    codec: str
    size_bytes: int
    source_bytes: int
    tensors: int
    out: str
