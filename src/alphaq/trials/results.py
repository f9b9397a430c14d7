"""What a comparison leaves: its journal, result by result, and the rows that are made of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import alphaq
from alphaq.checkpoint.writer import atomic_file
from alphaq.evaluation.fidelity import WindowScore, paired_bootstrap, summarize_windows
from alphaq.nouns.fidelity import Fidelity
from alphaq.trials.trial import window_scores

BASELINE = "uniform"
REFERENCE = "reference"
FORMAT_VERSION = 6  # of the journal; before, rows of models in memory and on disk could stand together
Key = tuple[str, float, str]  # method, bits, rounding


@dataclass(frozen=True)
class Row:
    """One method at one budget and one quantizer. `error` instead of figures where it has no plan.

    Differences are to `uniform` with the first quantizer.
    """

    method: str
    bits: float
    budget_bytes: int
    size_bytes: int | None = None
    average_bits: float | None = None
    bits_per_weight: float | None = None
    seconds_to_plan: float | None = None
    quantizer: str = ""
    seconds_to_quantize: float | None = None
    """Less where matrices were taken over from a method before."""
    perplexity: Mapping[str, float] | None = None
    mean_perplexity: float | None = None
    kl: float | None = None
    ear: float | None = None
    top1: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    error: str = ""
    taken: str = ""
    """For the default method, whether its plan stood beside uniform bits: "plan" or "uniform"."""
    windows_begin_with: str = ""
    """Special tokens before each window of text, in words."""
    layer_by_layer: bool = False
    """Whether weights were read from disk as they were used."""


class Job(BaseModel):
    """What results depend on, apart from method, budget and quantizer."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    checkpoint: str
    contents: str
    model_settings: str
    texts: dict[str, str]
    calibration: str | None
    settings: dict[str, object]
    alphaq: str = alphaq.__version__
    format_version: int = FORMAT_VERSION
    window: int
    max_tokens: int | None
    skip_tokens: int
    dtype: str
    layer_by_layer: bool


class Entry(BaseModel):
    """A line of the journal after the first: one result. scores: of windows, by text; digest: of what was scored."""

    model_config = ConfigDict(frozen=True)

    method: str
    bits: float
    rounding: str
    quantizer: str = ""
    windows_begin_with: str = ""
    layer_by_layer: bool = False
    budget_bytes: int
    size_bytes: int | None = None
    average_bits: float | None = None
    bits_per_weight: float | None = None
    seconds_to_plan: float | None = None
    seconds_to_quantize: float | None = None
    taken: str = ""
    error: str = ""
    digest: str | None = None
    scores: dict[str, list[list[int | float]]] | None = None

    @property
    def key(self) -> Key:
        """What tells results apart."""
        return self.method, self.bits, self.rounding

    def windows(self) -> dict[str, list[WindowScore]] | None:
        """Scores of windows by text; None where there is no plan."""
        return None if self.scores is None else window_scores(self.scores)


def rows_of(entries: Sequence[Entry], first: str) -> list[Row]:
    """Rows of results, with their differences to the baseline at the rounding `first`."""
    scores = {entry.key: windows for entry in entries if (windows := entry.windows()) is not None}
    shared = {field.name for field in fields(Row)} & Entry.model_fields.keys()
    rows = []
    for entry in entries:
        row = Row(**entry.model_dump(include=shared))
        plain = scores.get((BASELINE, entry.bits, first))
        if entry.key in scores:
            row = _scored(row, scores[entry.key])
            if plain is not None and (entry.method, entry.rounding) != (BASELINE, first):
                row = _against(row, scores[entry.key], plain)
        rows.append(row)
    return rows


def _scored(row: Row, scores: Mapping[str, list[WindowScore]]) -> Row:
    """A row with the figures of its scores."""
    fidelity = Fidelity({text: summarize_windows(windows, True) for text, windows in scores.items()})
    texts = list(fidelity.texts.values())
    return replace(
        row,
        perplexity={text: one.perplexity for text, one in fidelity.texts.items()},
        mean_perplexity=fidelity.geomean_perplexity,
        kl=fidelity.mean_kl,
        ear=sum(one.ear or 0.0 for one in texts) / len(texts),
        top1=sum(one.top1 or 0.0 for one in texts) / len(texts),
    )


def _against(row: Row, scores: Mapping[str, list[WindowScore]], plain: Mapping[str, list[WindowScore]]) -> Row:
    """A row with its difference to the baseline."""
    paired = paired_bootstrap(scores, plain)
    low, high = paired.interval
    return replace(row, difference=paired.ratio, difference_low=low, difference_high=high)


def write(out: Path, rows: Sequence[Row], job: Job) -> None:
    """comparison.json and comparison.csv; a text's perplexity is a column of its own in the latter."""
    with atomic_file(out / "comparison.json") as unfinished:
        content = {"job": job.model_dump(mode="json"), "rows": [asdict(row) for row in rows]}
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    texts = list(next((row.perplexity for row in rows if row.perplexity), {}))
    columns = [field.name for field in fields(Row) if field.name != "perplexity"]
    with atomic_file(out / "comparison.csv") as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *(f"perplexity_{text}" for text in texts)])
        for row in rows:
            by_text = row.perplexity or {}
            writer.writerow([*(getattr(row, name) for name in columns), *(by_text.get(text) for text in texts)])
