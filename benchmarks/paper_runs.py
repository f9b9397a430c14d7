"""The comparisons of `paper.py`: methods at the same bytes, γ, budgets of blocks, one choice for a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from alphaq.calibration.text import Text
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.plan import Plan
    from alphaq.nouns.scoring import Scoring
    from alphaq.planning import Request
    from alphaq.trials.results import Row
    from alphaq.writing.rounding import Rounding

MAIN = "methods"
METHODS = ("uniform", "pmq", "paper", "auto")
BY_BLOCK = "paper:per_layer=true"
LAYERWISE = "paper, one choice for a layer"
Roles = Literal["fixed", "shared"]


@dataclass(frozen=True)
class Experiment:
    """What is run. calibration: for PMQ and GPTQ. roundings: the first is used for everything but the first table."""

    checkpoint: Checkpoint
    scoring: Scoring
    bits: tuple[float, ...]
    calibration: Text
    roundings: tuple[Rounding, ...]
    out: Path

    @property
    def name(self) -> str:
        """The model's, also where its folder is a commit in the hub's cache."""
        from alphaq.checkpoint.hub import model_name

        return model_name(self.checkpoint.folder)

    @contextmanager
    def resources(self) -> Iterator[Resources]:
        """Workers, and what was measured before."""
        from alphaq.measuring.cache import Cache
        from alphaq.measuring.resources import Resources
        from alphaq.terminal import progress
        from alphaq.work.workers import Workers, sensible_count

        identity = {"fingerprint": self.checkpoint.fingerprint, "contents": self.checkpoint.contents()}
        with (
            Cache(self.out / "cache", identity) as cache,
            Workers(sensible_count(self.checkpoint.nbytes), self.checkpoint) as workers,
        ):
            yield Resources(workers, cache, progress)

    def compared(self, name: str, methods: Sequence[str], bits: Sequence[float], roles: Roles = "fixed") -> list[Row]:
        """Rows of methods at the same bytes, kept in a folder of that name; the first table has all roundings."""
        from alphaq.nouns.settings import Budget, PlanConfig
        from alphaq.trials.compare import Comparison, compare

        roundings = self.roundings if name == MAIN else self.roundings[:1]
        config = PlanConfig(budget=Budget(bits=min(bits)), roles=roles, fast=roles == "fixed")
        with self.resources() as resources:
            comparison = Comparison(methods, bits, config, self.calibration, roundings)
            return compare(self.checkpoint, comparison, self.scoring, self.out / name, resources)

    def request(self, method: str, size_bytes: int, layerwise: bool = False) -> Request:
        """A method's request at a budget. layerwise: a layer's experts share one choice."""
        from alphaq.nouns.settings import Budget, PlanConfig
        from alphaq.planning import resolve
        from alphaq.trials.compare import variant_of

        request = resolve(
            variant_of(PlanConfig(budget=Budget(size_bytes=size_bytes), roles="fixed", fast=True), method)
        )
        return replace(request, profile=replace(request.profile, unit="layer")) if layerwise else request

    def plan(self, request: Request, resources: Resources) -> Plan:
        """The plan of a request, measured for as far as the cache does not know."""
        from alphaq.planning import PlanInputs, checked_plan, measure_for_plan

        text = self.calibration if request.method.needs_text else None
        measured = measure_for_plan(self.checkpoint, request, PlanInputs(text=text), resources)
        return checked_plan(self.checkpoint, request, measured, resources)


def layerwise(run: Experiment, rows: Sequence[Row]) -> list[Row]:
    """The paper's rule with one choice for all experts of a layer, at the bytes of each row of `uniform`."""
    from alphaq.trials.results import Entry, rows_of
    from alphaq.work.journal import Journal

    budgets = {row.bits: row.budget_bytes for row in rows if row.method == "uniform"}
    with Journal(run.out / MAIN / "layerwise.jsonl") as journal:  # of this run, as that folder's comparison is
        known = map(Entry.model_validate, journal.entries)
        entries = [entry for entry in known if budgets.get(entry.bits) == entry.budget_bytes]
        missing = budgets.keys() - {entry.bits for entry in entries}
        for entry in _tried(run, {bits: budgets[bits] for bits in sorted(missing)}):
            entries.append(entry)
            journal.append(entry.model_dump(exclude_none=True))
    return rows_of(sorted(entries, key=lambda entry: entry.bits), str(run.roundings[0]))


def _tried(run: Experiment, budgets: dict[float, int]) -> Iterator[Any]:
    from tempfile import TemporaryDirectory

    from alphaq.errors import BudgetError
    from alphaq.evaluation.fidelity import read_texts, score_texts, window_beginning
    from alphaq.trials.results import Entry
    from alphaq.trials.trial import Trials

    if not budgets:
        return
    scoring, first = run.scoring, run.roundings[0]
    score = partial(score_texts, texts=read_texts(scoring.texts), scoring=scoring)
    with run.resources() as resources, TemporaryDirectory(dir=run.out) as scratch:
        trials = Trials(run.checkpoint, score, Path(scratch) / "trials", scoring, resources.wrap, resources.workers)
        common = Entry(
            method=LAYERWISE,
            bits=0,
            rounding=str(first),
            quantizer=first.name,
            budget_bytes=0,
            windows_begin_with=window_beginning(trials.tokenizer, scoring.bos),
            layer_by_layer=bool(scoring.stream),
        )
        for bits, size_bytes in budgets.items():
            entry = common.model_copy(update={"bits": bits, "budget_bytes": size_bytes})
            try:
                plan = run.plan(run.request("paper", size_bytes, layerwise=True), resources)
            except BudgetError as error:
                yield entry.model_copy(update={"error": str(error)})
                continue
            figures = {"size_bytes": plan.size_bytes, "bits_per_weight": plan.bits_per_weight}
            yield Entry.model_validate(entry.model_dump() | figures | trials.run(plan, first))
