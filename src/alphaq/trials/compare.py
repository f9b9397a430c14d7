"""Many allocators, one model, the same bytes: plan, quantize, evaluate, side by side.

Every method gets the bytes of a plain mix of the budget's width, to the byte. What is measured of the
weights is measured once; a matrix quantized for one method is taken over by the next; equal plans are
evaluated once; and results are kept in a journal, so a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from alphaq.calibration.text import Text
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import AlphaQError, BudgetError, OutputError, StatsError
from alphaq.evaluation.fidelity import read_texts, score_texts, window_beginning
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.option import settings_of
from alphaq.nouns.plan import Plan, first_fault
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import Measurements, PlanInputs, Request, checked_plan, measure_for_plans, plain_size, resolve
from alphaq.registry import unknown
from alphaq.sensitivity.methods import METHODS
from alphaq.trials.results import BASELINE, REFERENCE, Entry, Job, Key, Row, rows_of, write
from alphaq.trials.trial import Trials, settled
from alphaq.work.journal import Journal
from alphaq.writing.rounding import Rounding

JOURNAL_NAME = "results.jsonl"
SCRATCH_NAME = ".alphaq-scratch"
DROPPING = ("drop", "drop_counts", "max_drop", "max_drop_loss")
VARIABLE = {name: setting for name, setting in settings_of(PlanConfig).items() if setting.option.varies}
"""Settings that a method may have for itself, in `alphaq:gamma=2`."""


@dataclass(frozen=True)
class Comparison:
    """What is compared: every method at every budget, in bits, and with every rounding (the usual one by default).

    config: settings common to all methods; its budget and method are replaced. calibration: for methods that look at
    a text.
    """

    methods: Sequence[str]
    bits: Sequence[float]
    config: PlanConfig | None = None
    calibration: Text | None = None
    roundings: Sequence[Rounding] = ()


def compare(
    checkpoint: Checkpoint,
    comparison: Comparison,
    scoring: Scoring,
    out: Path,
    resources: Resources = USUAL,
) -> list[Row]:
    """Run the comparison in the folder `out` and write `comparison.csv` and `comparison.json` there.

    `uniform` is always among the methods. Models of an unfinished comparison are run as it began, in memory or layer by
    layer. The resources' cache is closed once everything is measured. Raises
    OutputError if `out` holds a comparison of something else, or other files.
    """
    race = _Race.of(checkpoint, comparison, as_begun(scoring, out))
    _claim(out)
    with Journal(out / JOURNAL_NAME) as journal:
        entries = {entry.key: entry for entry in _known(journal, race.job, out)}
        missing = [key for key in race.wanted if key not in entries]
        if missing:
            known = {one.digest: one.scores for one in entries.values() if one.digest is not None}
            for entry in race.results(missing, known, out / SCRATCH_NAME, resources):
                entries[entry.key] = entry
                journal.append(entry.model_dump(exclude_none=True))
    shutil.rmtree(out / SCRATCH_NAME, ignore_errors=True)
    rows = rows_of([entries[key] for key in race.wanted], next(iter(race.roundings)))
    write(out, rows, race.job)
    return rows


@dataclass(frozen=True)
class _Race:
    """A comparison made concrete.

    sizes: bytes of weight files by bits. roundings: by what tells them apart. contents: texts by name. wanted: results,
    in the order of the rows. bos: whether windows begin with what the tokenizer puts before a text.
    """

    checkpoint: Checkpoint
    requests: Mapping[str, Request]
    sizes: Mapping[float, int]
    roundings: Mapping[str, Rounding]
    contents: Mapping[str, str]
    scoring: Scoring
    calibration: Text | None
    wanted: Sequence[Key]
    job: Job

    @classmethod
    def of(cls, checkpoint: Checkpoint, comparison: Comparison, scoring: Scoring) -> _Race:
        """Raises AlphaQError for what cannot be compared, before any work."""
        bits = [cast(float, Budget.of(bits=width).bits) for width in dict.fromkeys(comparison.bits)]
        asked_for = list(dict.fromkeys(comparison.methods))
        methods = asked_for if BASELINE in asked_for else [BASELINE, *asked_for]
        roundings = {str(rounding): rounding for rounding in comparison.roundings or [Rounding.of("native")]}
        first = next(iter(roundings))
        base = comparison.config or PlanConfig(budget=Budget(bits=bits[0]))
        scoring, _ = settled(scoring.model_copy(update={"bos": base.bos}), checkpoint, max(bits))
        contents = read_texts(scoring.texts)
        plain = resolve(_as_it_can(base.model_copy(update={"method": BASELINE})))
        sizes = {width: plain_size(checkpoint, plain, width) for width in bits}
        base = base.model_copy(update={"budget": Budget(size_bytes=sizes[bits[0]])})
        pairs = [(name, one) for name in methods for one in roundings if name in asked_for or one == first]
        return cls(
            checkpoint,
            _requests(base, methods, comparison.calibration),
            sizes,
            roundings,
            contents,
            scoring,
            comparison.calibration,
            [(REFERENCE, 16.0, ""), *((name, width, one) for width in bits for name, one in pairs)],
            _job(checkpoint, base, contents, comparison.calibration, scoring),
        )

    def results(
        self,
        missing: Sequence[Key],
        known: Mapping[str, object],
        scratch: Path,
        resources: Resources,
    ) -> Iterator[Entry]:
        """The missing results. known: scores of earlier ones, by digest."""
        measured = self._measured({name for name, _, _ in missing}, resources)
        score = partial(score_texts, texts=self.contents, scoring=self.scoring)
        trials = Trials(self.checkpoint, score, scratch, self.scoring, resources.wrap, resources.workers)
        trials.known = dict(known)
        beginning = window_beginning(trials.tokenizer, self.scoring.bos)
        for entry, plan in self._plans(missing, measured, resources):
            rounding = self.roundings.get(entry.rounding)
            tried = {} if entry.error else trials.run(plan, rounding)
            quantizer = "" if rounding is None else rounding.name
            told = {
                "quantizer": quantizer,
                "windows_begin_with": beginning,
                "layer_by_layer": bool(self.scoring.stream),
            }
            yield Entry.model_validate(entry.model_dump() | told | tried)

    def _measured(self, methods: set[str], resources: Resources) -> dict[str, Measurements]:
        """What plans of these methods need to know."""
        measured = measure_for_plans(
            self.checkpoint,
            {name: request for name, request in self.requests.items() if name in methods},
            PlanInputs(text=self.calibration),
            resources,
            check_budget=False,  # an infeasible budget costs its own row only
        )
        if resources.cache is not None:
            resources.cache.close()  # others may measure while this one evaluates
        return measured

    def _plans(
        self, keys: Sequence[Key], measured: Mapping[str, Measurements], resources: Resources
    ) -> Iterator[tuple[Entry, Plan | None]]:
        """The entry of each key so far, with its plan; None for the reference, and where there is none."""
        for name, width, rounding in keys:
            if name == REFERENCE:
                size = self.checkpoint.nbytes
                yield Entry(method=name, bits=width, rounding=rounding, budget_bytes=size, size_bytes=size), None
                continue
            entry = Entry(method=name, bits=width, rounding=rounding, budget_bytes=self.sizes[width])
            request = self.requests[name]
            config = request.config.model_copy(update={"budget": Budget(size_bytes=self.sizes[width])})
            begin = time.perf_counter()
            try:
                plan = checked_plan(self.checkpoint, replace(request, config=config), measured[name], resources)
            except BudgetError as error:
                yield entry.model_copy(update={"error": str(error)}), None
                continue
            measuring = sum(measured[name].seconds.get(need, 0.0) for need in request.method.needs)
            figures = {
                "size_bytes": plan.size_bytes,
                "average_bits": plan.average_bits,
                "bits_per_weight": plan.bits_per_weight,
                "seconds_to_plan": time.perf_counter() - begin + measuring,
                "taken": "" if plan.check is None else plan.check.taken,
            }
            yield entry.model_copy(update=figures), plan


def variant_of(base: PlanConfig, name: str) -> PlanConfig:
    """The config of a method as `compare` names it: `alphaq`, or with its own settings, `alphaq:gamma=2:tail=ks`.

    Raises AlphaQError for a setting that is not one of `VARIABLE`, or a bad value.
    """
    method, *settings = name.split(":")
    changes: dict[str, object] = {"method": method}
    if method in METHODS and "choices" in METHODS[method].preset:  # which are not of those that --fast leaves out
        changes["fast"] = False
    for setting in settings:
        key, separator, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or key not in VARIABLE:
            raise AlphaQError(unknown(f"setting of method {method}", key, VARIABLE) + " Write method:name=value.")
        changes[key] = value
    try:
        return PlanConfig.model_validate(base.model_dump() | changes)
    except ValueError as error:
        raise AlphaQError(f"Method {name!r}: {first_fault(error)}.") from None


def _known(journal: Journal, job: Job, out: Path) -> Iterable[Entry]:
    """Results that the journal has; a new one begins with the job. Raises OutputError if it is of another job."""
    line = {"job": job.model_dump(mode="json")}
    if not journal.entries:
        journal.append(line)
    elif journal.entries[0] != line:
        begun = journal.entries[0].get("job")
        if isinstance(begun, dict) and begun | {"layer_by_layer": job.layer_by_layer} == line["job"]:
            way = "in memory" if job.layer_by_layer else "layer by layer from disk"
            raise OutputError(
                f"{out} holds a comparison of models run {way}, whose figures differ a little. Leave out --stream and "
                "--no-stream to go on with it, or choose another output."
            )
        raise OutputError(f"{out} holds a comparison of another model, texts or settings. Choose another output.")
    return map(Entry.model_validate, journal.entries[1:])


def as_begun(scoring: Scoring, out: Path) -> Scoring:
    """The scoring with `stream` as in the comparison that a folder holds, where neither way is asked for."""
    if scoring.stream is None:
        with suppress(OSError, ValueError, KeyError, TypeError), (out / JOURNAL_NAME).open(encoding="utf-8") as file:
            job = json.loads(file.readline())["job"]
            if job["dtype"] == scoring.dtype:
                return scoring.model_copy(update={"stream": bool(job["layer_by_layer"])})
    return scoring


def _claim(out: Path) -> None:
    """Make the folder, or see that it is empty or a comparison's. Raises OutputError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            with (out / JOURNAL_NAME).open("rb") as file:
                begin = b'{"job":'
                if not begin.startswith(file.readline()[: len(begin)]):  # a killed run may have left a part of it
                    raise FileNotFoundError
        shutil.rmtree(out / SCRATCH_NAME, ignore_errors=True)  # of a killed run
    except FileNotFoundError:
        raise OutputError(f"{out} is not empty and holds no comparison. Choose another output.") from None
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror}. Choose another output.") from error


def _as_it_can(config: PlanConfig) -> PlanConfig:
    """The settings without what their method has no losses for: budgets of layers to share out, experts to drop."""
    own = METHODS.get(config.method, METHODS[BASELINE])
    if own.kind in ("order", "ratio"):
        config = config.model_copy(update={"per_layer": False})
    if own.needs_fisher:
        return config
    return config.model_copy(update={name: PlanConfig.model_fields[name].default for name in DROPPING})


def _requests(base: PlanConfig, methods: Sequence[str], calibration: Text | None) -> dict[str, Request]:
    """Every method's request. Raises AlphaQError before any work."""
    requests = {}
    for name in methods:
        requests[name] = resolve(_as_it_can(variant_of(base, name)))
        if requests[name].method.needs_text and calibration is None:
            raise StatsError(f"Method {name} needs a text. Give one with --calibration FILE, or leave it out.")
    return requests


def _job(
    checkpoint: Checkpoint,
    base: PlanConfig,
    contents: Mapping[str, str],
    calibration: Text | None,
    scoring: Scoring,
) -> Job:
    return Job(
        checkpoint=checkpoint.fingerprint,
        contents=checkpoint.contents(),
        model_settings=checkpoint.settings_digest(),
        texts={name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in contents.items()},
        calibration=None if calibration is None else str(calibration),
        settings=base.model_dump(mode="json", exclude={"budget", "method", "calibration"}),
        window=scoring.window,
        max_tokens=scoring.max_tokens,
        skip_tokens=scoring.skip_tokens,
        dtype=scoring.dtype,
        layer_by_layer=bool(scoring.stream),
    )
