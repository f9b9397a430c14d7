"""Many allocators, one model, the same bytes: plan, quantize, evaluate, side by side.

Every method gets the bytes of a plain mix of the budget's width, to the byte. What is measured of the
weights is measured once; a matrix quantized for one method is taken over by the next; equal plans are
evaluated once; and results are kept in a journal, so a killed run goes on where it was.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import alphaq
from alphaq.calibration.text import Text
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.writer import atomic_file
from alphaq.errors import AlphaQError, BudgetError, OutputError, StatsError
from alphaq.evaluation.fidelity import (
    WindowScore,
    paired_bootstrap,
    read_texts,
    score_texts,
    summarize_windows,
    window_beginning,
)
from alphaq.measuring.cache import Cache
from alphaq.nouns.fidelity import Fidelity
from alphaq.nouns.plan import Plan, first_fault
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import Measurements, PlanInputs, Request, checked_plan, measure_for_plans, plain_size, resolve
from alphaq.registry import unknown
from alphaq.sensitivity.methods import METHODS
from alphaq.trials.trial import Trials, window_scores
from alphaq.work.journal import Journal
from alphaq.work.resources import Resources
from alphaq.work.workers import Workers, Wrap, silent
from alphaq.writing.calibrated import Rounding

BASELINE = "uniform"
REFERENCE = "reference"
JOURNAL_NAME = "results.jsonl"
FORMAT_VERSION = 5  # of the journal
SCRATCH_NAME = ".alphaq-scratch"
Scores = dict[str, list[WindowScore]]
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


def compare(
    checkpoint: Checkpoint,
    methods: Sequence[str],
    bits: Sequence[float],
    texts: Sequence[Path],
    out: Path,
    config: PlanConfig | None = None,
    calibration: Text | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    skip_tokens: int = 0,
    dtype: str = "float32",
    device: str | None = None,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    cache: Cache | None = None,
    roundings: Sequence[Rounding] = (),
) -> list[Row]:
    """Run the comparison in the folder `out` and write `comparison.csv` and `comparison.json` there.

    `uniform` is always among the methods. The cache is closed once everything is measured. config: settings common
    to all methods (its budget and method are replaced). roundings: the usual one by default. Raises
    OutputError if `out` holds a comparison of something else, or other files.
    """
    bits = [cast(float, Budget.of(bits=width).bits) for width in dict.fromkeys(bits)]
    asked_for = list(dict.fromkeys(methods))
    methods = list(dict.fromkeys([*([] if BASELINE in asked_for else [BASELINE]), *asked_for]))
    quantizers = {str(rounding): rounding for rounding in roundings or [Rounding.of("native")]}
    first = next(iter(quantizers))
    base = config or PlanConfig(budget=Budget(bits=bits[0]))
    contents = read_texts(list(texts))
    plain = resolve(base.model_copy(update={"method": BASELINE}))
    sizes = {width: plain_size(checkpoint, plain, width) for width in bits}
    base = base.model_copy(update={"budget": Budget(size_bytes=sizes[bits[0]])})
    requests = _requests(base, methods, calibration)
    job = _job(checkpoint, base, contents, calibration) | {
        "window": window,
        "max_tokens": max_tokens,
        "skip_tokens": skip_tokens,
        "dtype": dtype,
    }
    _claim(out)
    with Journal(out / JOURNAL_NAME) as journal:
        if journal.entries and journal.entries[0] != {"job": job}:
            raise OutputError(f"{out} holds a comparison of another model, texts or settings. Choose another output.")
        if not journal.entries:
            journal.append({"job": job})
        entries = {(entry["method"], entry["bits"], entry["rounding"]): entry for entry in journal.entries[1:]}
        pairs = [(name, one) for name in methods for one in quantizers if name in asked_for or one == first]
        wanted = [(REFERENCE, 16.0, ""), *((name, width, one) for width in bits for name, one in pairs)]
        missing = [key for key in wanted if key not in entries]
        if missing:
            asked = {name: request for name, request in requests.items() if any(key[0] == name for key in missing)}
            measured = measure_for_plans(
                checkpoint,
                asked,
                PlanInputs(text=calibration),
                Resources(workers, cache, wrap),
                check_budget=False,  # an infeasible budget costs its own row only
            )
            if cache is not None:
                cache.close()  # others may measure while this one evaluates
            runs = _runs(checkpoint, requests, measured, missing, sizes, cache)
            score = partial(
                score_texts, texts=contents, window=window, max_tokens=max_tokens, skip_tokens=skip_tokens, bos=base.bos
            )
            trials = Trials(checkpoint, score, out / SCRATCH_NAME, dtype, wrap, workers, device)
            trials.known = {entry["digest"]: entry["scores"] for entry in entries.values() if "scores" in entry}
            for key, plan, entry in runs:
                rounding = quantizers.get(key[2])
                entry |= {"rounding": key[2], "quantizer": "" if rounding is None else rounding.name}
                entry["windows_begin_with"] = window_beginning(trials.tokenizer, base.bos)
                entries[key] = entry | ({} if "error" in entry else trials.run(plan, rounding))
                journal.append(entries[key])
    shutil.rmtree(out / SCRATCH_NAME, ignore_errors=True)
    rows = _rows([entries[key] for key in wanted], first)
    _write(out, rows, job)
    return rows


SETTINGS = (
    "gamma",
    "noise",
    "spectrum",
    "tail",
    "seed",
    "min_sqnr_db",
    "per_layer",
    "unweighted",
    "symmetric",
    "check",
)


def variant_of(base: PlanConfig, name: str) -> PlanConfig:
    """The config of a method as `compare` names it: `alphaq`, or with its own settings, `alphaq:gamma=2:tail=ks`.

    Raises AlphaQError for a setting that is not one of `SETTINGS`, or a bad value.
    """
    method, *settings = name.split(":")
    changes: dict[str, Any] = {"method": method}
    for setting in settings:
        key, separator, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or key not in SETTINGS:
            raise AlphaQError(unknown(f"setting of method {method}", key, SETTINGS) + " Write method:name=value.")
        changes[key] = value
    try:
        return PlanConfig.model_validate(base.model_dump() | changes)
    except ValueError as error:
        raise AlphaQError(f"Method {name!r}: {first_fault(error)}.") from None


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


def _requests(base: PlanConfig, methods: Sequence[str], calibration: Text | None) -> dict[str, Request]:
    """Every method's request. Raises AlphaQError before any work."""
    found = {}
    for name in methods:
        config = variant_of(base, name)
        if METHODS.get(config.method, METHODS[BASELINE]).kind in ("order", "ratio"):
            config = config.model_copy(update={"per_layer": False})  # they have no losses to share out
        found[name] = resolve(config)
        if found[name].method.needs_text and calibration is None:
            raise StatsError(f"Method {name} needs a text. Give one with --calibration FILE, or leave it out.")
    return found


def _job(
    checkpoint: Checkpoint,
    base: PlanConfig,
    contents: Mapping[str, str],
    calibration: Text | None,
) -> dict[str, Any]:
    """What results depend on, apart from method and budget."""
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in contents.items()}
    settings = base.model_dump(mode="json", exclude={"budget", "method", "calibration"})
    return {
        "checkpoint": checkpoint.fingerprint,
        "contents": checkpoint.contents(),
        "model_settings": checkpoint.settings_digest(),
        "texts": digests,
        "calibration": None if calibration is None else str(calibration),
        "settings": settings,
        "alphaq": alphaq.__version__,
        "format_version": FORMAT_VERSION,
    }


def _runs(
    checkpoint: Checkpoint,
    requests: Mapping[str, Request],
    measured: Mapping[str, Measurements],
    missing: Sequence[Key],
    sizes: Mapping[float, int],
    cache: Cache | None,
) -> Iterable[tuple[Key, Plan | None, dict[str, Any]]]:
    """For each missing result its plan (None for the reference) and the entry so far."""
    for key in missing:
        name, width, _ = key
        entry: dict[str, Any] = {"method": name, "bits": width}
        if name == REFERENCE:
            yield key, None, entry | dict.fromkeys(("budget_bytes", "size_bytes"), checkpoint.nbytes)
            continue
        request = requests[name]
        found = measured[name]
        size = sizes[width]
        entry["budget_bytes"] = size
        budget = {"budget": Budget(size_bytes=size)}
        begin = time.perf_counter()
        try:
            plan = checked_plan(
                checkpoint,
                replace(request, config=request.config.model_copy(update=budget)),
                found,
                Resources(cache=cache),
            )
        except BudgetError as error:
            yield key, None, entry | {"error": str(error)}
            continue
        seconds = time.perf_counter() - begin + sum(found.seconds.get(need, 0.0) for need in request.method.needs)
        entry |= {
            "size_bytes": plan.size_bytes,
            "average_bits": plan.average_bits,
            "bits_per_weight": plan.bits_per_weight,
            "seconds_to_plan": seconds,
            "taken": "" if plan.check is None else plan.check.taken,
        }
        yield key, plan, entry


def _rows(entries: Sequence[Mapping[str, Any]], first: str) -> list[Row]:
    scores: dict[Key, Scores] = {
        (entry["method"], entry["bits"], entry["rounding"]): window_scores(entry["scores"])
        for entry in entries
        if "scores" in entry
    }
    rows = []
    for entry in entries:
        kept = {key: value for key, value in entry.items() if key not in ("scores", "digest", "rounding")}
        own = scores.get((entry["method"], entry["bits"], entry["rounding"]))
        if own is None:
            rows.append(Row(**kept))
            continue
        fidelity = Fidelity({text: summarize_windows(windows, True) for text, windows in own.items()})
        found = list(fidelity.texts.values())
        figures: dict[str, Any] = {
            "perplexity": {text: one.perplexity for text, one in fidelity.texts.items()},
            "mean_perplexity": fidelity.geomean_perplexity,
            "kl": fidelity.mean_kl,
            "ear": sum(one.ear or 0.0 for one in found) / len(found),
            "top1": sum(one.top1 or 0.0 for one in found) / len(found),
        }
        plain = scores.get((BASELINE, entry["bits"], first))
        if plain is not None and (entry["method"], entry["rounding"]) != (BASELINE, first):
            paired = paired_bootstrap(own, plain)
            figures |= {
                "difference": paired.ratio,
                "difference_low": paired.interval[0],
                "difference_high": paired.interval[1],
            }
        rows.append(Row(**kept, **figures))
    return rows


def _write(out: Path, rows: Sequence[Row], job: Mapping[str, Any]) -> None:
    """comparison.json and comparison.csv; a text's perplexity is a column of its own in the latter."""
    with atomic_file(out / "comparison.json") as unfinished:
        content = {"job": job, "rows": [asdict(row) for row in rows]}
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    texts = list(next((row.perplexity for row in rows if row.perplexity), {}))
    with atomic_file(out / "comparison.csv") as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table: list[dict[str, Any]] = []
        for row in rows:
            cells = asdict(row)
            by_text = cells.pop("perplexity") or {}
            table.append(cells | {f"perplexity_{text}": by_text.get(text) for text in texts})
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
