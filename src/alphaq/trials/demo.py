"""`alphaq demo`: the main job on the bundled model: plan, quantize, evaluate, report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.writer import atomic_folder
from alphaq.evaluation.evaluate import evaluate, fidelity_json
from alphaq.measuring.resources import Resources
from alphaq.nouns.fidelity import Fidelity
from alphaq.nouns.plan import Plan
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import checked_plan, measure_for_plan, resolve
from alphaq.report.content import Sources
from alphaq.report.densities import densities
from alphaq.report.html import write_report
from alphaq.report.places import places_of_matrices
from alphaq.report.runs import ComparedRow, read_run
from alphaq.work.workers import Wrap, silent
from alphaq.writing.quantizing import quantize

MAX_TOKENS = 4096
KEPT_BITS = 16.0


@dataclass(frozen=True)
class _Run:
    """One of the models that are compared."""

    label: str
    method: str
    bits: float


REFERENCE = _Run("bf16", "reference", KEPT_BITS)
RUNS = (_Run("uniform 2", "uniform", 2.0), _Run("AlphaQ 2.5", "auto", 2.5), _Run("uniform 3", "uniform", 3.0))


@dataclass(frozen=True)
class DemoRow:
    """One model: what it takes, and how faithful it is."""

    run: _Run
    average_bits: float
    bits_per_weight: float
    size_bytes: int
    fidelity: Fidelity

    def as_json(self) -> dict[str, object]:
        """As `results.json` has it."""
        return {
            "label": self.run.label,
            "average_bits": self.average_bits,
            "bits_per_weight": self.bits_per_weight,
            "size_bytes": self.size_bytes,
            **fidelity_json(self.fidelity),
        }

    def compared(self) -> ComparedRow:
        """As a row of a comparison."""
        return ComparedRow(
            method=self.run.method,
            bits=self.run.bits,
            size_bytes=self.size_bytes,
            average_bits=self.average_bits,
            bits_per_weight=self.bits_per_weight,
            perplexity={name: text.perplexity for name, text in self.fidelity.texts.items()},
            mean_perplexity=self.fidelity.geomean_perplexity,
            kl=self.fidelity.mean_kl,
        )


@dataclass(frozen=True)
class DemoResult:
    """Every model's row, and where the report and the quantized model are."""

    rows: tuple[DemoRow, ...]
    report: Path
    model: Path

    def as_json(self) -> dict[str, object]:
        """What `--json` prints."""
        return {
            "rows": [row.as_json() for row in self.rows],
            "report": str(self.report),
            "model": str(self.model),
        }


def demo(out: Path, wrap: Wrap = silent) -> DemoResult:
    """The main job on the bundled model. Writes `out`, which appears complete or not at all."""
    with atomic_folder(out) as folder, as_file(files("alphaq") / "data") as data:
        checkpoint, texts = open_checkpoint(data / "tiny"), sorted((data / "texts").glob("*.txt"))
        rows = _rows(checkpoint, texts, folder / "model", wrap)
        result = DemoResult(tuple(rows), out / "report.html", out / "model")
        _report(checkpoint, folder, rows, wrap)
        (folder / "results.json").write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    return result


def _rows(checkpoint: Checkpoint, texts: list[Path], model: Path, wrap: Wrap) -> list[DemoRow]:
    """Every model, quantized and evaluated. model: where the default method's is to stay."""
    source = checkpoint.folder
    config = PlanConfig(budget=Budget(bits=2.5))
    measured = measure_for_plan(checkpoint, resolve(config), resources=Resources(wrap=wrap), settle=False)
    scoring = Scoring(texts=tuple(texts), max_tokens=MAX_TOKENS, dtype="auto")
    itself = evaluate(source, scoring, source)
    rows = [DemoRow(REFERENCE, KEPT_BITS, KEPT_BITS, checkpoint.nbytes, itself)]
    with TemporaryDirectory() as scratch:
        for run in RUNS:
            asked = config.model_copy(update={"budget": Budget(bits=run.bits), "method": run.method})
            plan = checked_plan(checkpoint, resolve(asked), measured)
            target = model if run.method == "auto" else Path(scratch) / run.label
            size_bytes = quantize(checkpoint, plan, target, resources=Resources(wrap=wrap)).size_bytes
            fidelity = evaluate(target, scoring, source, wrap)
            rows.append(_row(run, plan, size_bytes, fidelity))
    return rows


def _row(run: _Run, plan: Plan, size_bytes: int, fidelity: Fidelity) -> DemoRow:
    assert plan.average_bits is not None and plan.bits_per_weight is not None  # it was made here
    return DemoRow(run, plan.average_bits, plan.bits_per_weight, size_bytes, fidelity)


def _report(checkpoint: Checkpoint, folder: Path, rows: list[DemoRow], wrap: Wrap) -> None:
    made = read_run(folder / "model")
    sources = Sources(
        places_of_matrices(checkpoint.matrices),
        "the model",
        densities=dict(densities(checkpoint, made.plan, resources=Resources(wrap=wrap))),
        compared=[row.compared() for row in rows],
    )
    write_report(folder / "report.html", made, sources)
