"""What a report or a plot is made of, as earlier commands left it: a plan with what was written by it, comparisons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from alphaq.engines.output import MANIFEST_NAME, NO_OPTIONS, PLAN_NAME, QuantizeOptions, read_manifest
from alphaq.errors import AlphaQError, OutputError
from alphaq.nouns.plan import Plan, first_fault
from alphaq.quantizers.base import DEFAULT, FORMERLY
from alphaq.work.untrusted import parse_json, read_bounded

COMPARISON_NAME = "comparison.json"


@dataclass(frozen=True)
class Run:
    """A plan; name: of its file or folder. measured: Σ(w − ŵ)²/Σw² by matrix as written; empty for a plan alone, of
    which no options are known either."""

    name: str
    plan: Plan
    measured: dict[str, float] = field(default_factory=dict)
    options: QuantizeOptions = NO_OPTIONS


def read_run(path: Path) -> Run:
    """A plan file, or a folder that holds plan.json and perhaps a manifest. Raises AlphaQError."""
    file = path / PLAN_NAME if path.is_dir() else path
    if not file.is_file():
        raise AlphaQError(f"No plan file {file}. Make one with `alphaq plan MODEL --bits 2.5 -o {file.name}`.")
    run = Run(path.resolve().name, Plan.read(file))
    if not (path / MANIFEST_NAME).is_file():
        return run
    manifest = read_manifest(path / MANIFEST_NAME)
    measured = {name: one.relative_error for name, one in manifest.tensors.items() if one.relative_error is not None}
    return replace(run, measured=measured, options=manifest.options or NO_OPTIONS)


class ComparedRow(BaseModel):
    """A row of a comparison, as far as it is shown: one method at one budget."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    method: str
    bits: float
    quantizer: str = ""
    size_bytes: int | None = None
    average_bits: float | None = None
    bits_per_weight: float | None = None
    perplexity: dict[str, float] | None = None
    mean_perplexity: float | None = None
    kl: float | None = None
    error: str = ""

    @property
    def label(self) -> str:
        """Method, and the quantizer where it is named."""
        return self.method if not self.quantizer else f"{self.method} ({self.quantizer})"


class _Job(BaseModel):
    format_version: int = 0


class _Comparison(BaseModel):
    rows: list[ComparedRow] = Field(min_length=1)
    job: _Job = _Job()

    @property
    def todays_rows(self) -> list[ComparedRow]:
        """The rows with quantizers named as today: what had no name of its own was called rtn up to version 4."""
        if self.job.format_version > 4:
            return self.rows
        names = FORMERLY | {"rtn": DEFAULT}
        return [row.model_copy(update={"quantizer": names.get(row.quantizer, row.quantizer)}) for row in self.rows]


def read_comparison(folder: Path) -> list[ComparedRow]:
    """Rows of a folder that `alphaq compare` wrote. Raises OutputError."""
    path = folder / COMPARISON_NAME if folder.is_dir() else folder
    remedy = "Make one with `alphaq compare MODEL --text FILE -o FOLDER`."
    if not path.is_file():
        raise OutputError(f"No comparison {path}. {remedy}")
    try:
        rows = _Comparison.model_validate(parse_json(read_bounded(path))).todays_rows
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    except ValueError as error:
        raise OutputError(f"{path} is not a comparison: {first_fault(error)}. {remedy}") from None
    if len({row.quantizer for row in rows} - {""}) < 2:  # then it tells nothing apart
        rows = [row.model_copy(update={"quantizer": ""}) for row in rows]
    return rows
