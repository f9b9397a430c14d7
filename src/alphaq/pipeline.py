"""The stages composed: what each command does, as a plain function that a notebook can call too."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

import alphaq
from alphaq.allocation.problem import budget_costs, solve
from alphaq.cache import Cache
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.checkpoint.writer import atomic_file, atomic_folder, resumable_folder
from alphaq.config import Budget, PlanConfig
from alphaq.engines import native
from alphaq.engines.native_files import (
    MANIFEST_NAME,
    NativeFiles,
    TensorRecord,
    check_complete,
    create_shards,
    raise_faults,
    write_rest,
)
from alphaq.errors import AlphaQError, PlanError, StatsError
from alphaq.measurement import ahead, leaving, measure
from alphaq.quantization import CheckTask, StoreTask, check, plan_choices, store, store_tasks
from alphaq.records import Choice, Fidelity, MatrixRef, Plan, Spectrum
from alphaq.report.html import write_report
from alphaq.sensitivity.costs import cost_table
from alphaq.sensitivity.distortion import analytic_noise
from alphaq.spectra.measure import read_stats, write_stats
from alphaq.workers import Workers

T = TypeVar("T")
Wrap = Callable[[Iterable[T], int, str], Iterable[T]]
"""`wrap(items, total, label)` yields the items, showing progress or not."""


def silent(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """No progress shown."""
    return items


@dataclass(frozen=True)
class Measurements:
    """What was measured of the matrices to plan; enough for any number of budgets.

    noise: mean squared error [matrices, choices]. weights: parameters, or ones where unknown.
    """

    spectra: dict[str, Spectrum]
    noise: np.ndarray
    weights: np.ndarray
    left_out: dict[str, str]


def analyze(
    checkpoint: Checkpoint,
    out: Path,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    cache: Cache | None = None,
    device: str = "cpu",
) -> list[tuple[MatrixRef, Spectrum]]:
    """Measure every matrix and write the stats CSV."""
    matrices = checkpoint.matrices
    found = measure(matrices, workers or Workers(1, checkpoint), cache, device=device)
    rows = [
        (matrix, one.spectrum)
        for matrix, one in zip(matrices, wrap(found, len(matrices), "analyze"), strict=True)
        if one.spectrum is not None
    ]
    with atomic_file(out) as unfinished:
        write_stats(unfinished, rows)
    return rows


def measure_for_plan(
    checkpoint: Checkpoint | None,
    config: PlanConfig,
    stats: Path | None = None,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    cache: Cache | None = None,
    device: str = "cpu",
) -> Measurements:
    """Spectra and noise of the matrices to plan, from the weights, a stats file, or both.

    Raises StatsError if the stats lack a matrix of the checkpoint, or noise is to be measured without one.
    """
    choices = config.candidates()
    noise_kind = resolved_noise(checkpoint, config)
    given = read_stats(stats) if stats is not None else None
    if checkpoint is None:
        if given is None:
            raise StatsError("Nothing to plan. Give MODEL, or --stats with columns name, alpha, variance.")
        if noise_kind == "measured":
            raise StatsError("--noise measured needs the weights. Give MODEL, or use --noise analytic.")
        noise = np.array([analytic_noise(found, choices) for found in given.spectra.values()])
        known = given.parameters.keys() >= given.spectra.keys()
        weights = np.array([given.parameters[name] if known else 1 for name in given.spectra], dtype=np.int64)
        return Measurements(given.spectra, noise, weights, given.left_out)

    matrices = native.planned_matrices(checkpoint)
    weights = np.array([matrix.parameters for matrix in matrices], dtype=np.int64)
    native_problem(checkpoint, config, weights)  # an infeasible budget is told before any measuring
    if given is not None:
        for matrix in matrices:
            if matrix.name not in given.spectra:
                reason = given.left_out.get(matrix.name, "no row")
                raise StatsError(f"{stats} has no usable row for {matrix.name!r} ({reason}). Analyze this model again.")
    real = choices if noise_kind == "measured" else ()
    results = measure(matrices, workers or Workers(1, checkpoint), cache, given is None, real, device)
    spectra, noise_rows = {}, []
    for matrix, found in zip(matrices, wrap(results, len(matrices), "measure"), strict=True):
        own = found.spectrum or (given.spectra[matrix.name] if given is not None else None)
        assert own is not None  # measured unless given
        spectra[matrix.name] = own
        noise_rows.append(
            [found.squared_errors[choice] / matrix.parameters for choice in choices]
            if real
            else analytic_noise(own, choices)
        )
    left_out = {} if given is None else {n: why for n, why in given.left_out.items() if "not an expert" not in why}
    return Measurements(spectra, np.array(noise_rows), weights, left_out)


@dataclass(frozen=True)
class Problem:
    """A budget in whole units: costs [matrices, choices] and their limit; choices fixed by role beside it."""

    costs: np.ndarray
    limit: int
    block_bytes: np.ndarray | None
    fixed: dict[str, Choice]


def native_problem(checkpoint: Checkpoint | None, config: PlanConfig, weights: np.ndarray) -> Problem:
    """What the budget allows, from shapes alone. Raises BudgetError if it is infeasible."""
    choices = config.candidates()
    if checkpoint is None:
        return Problem(*budget_costs(config.budget, choices, weights, None, None, 0), None, {})
    matrices = native.planned_matrices(checkpoint)
    block_bytes, file_bytes = native.byte_tables(matrices, choices)
    fixed = native.fixed_matrices(checkpoint, config.fixed_choices())
    narrowest = {matrix.name: choices[0] for matrix in matrices}
    fixed_bytes = native.size_bytes(checkpoint, fixed | narrowest) - int(file_bytes[:, 0].sum())
    costs, limit = budget_costs(config.budget, choices, weights, block_bytes, file_bytes, fixed_bytes)
    return Problem(costs, limit, block_bytes, fixed)


def resolved_noise(checkpoint: Checkpoint | None, config: PlanConfig) -> str:
    """The config's noise, or what it means when left open."""
    return config.noise or ("analytic" if checkpoint is None else "measured")


def make_plan(checkpoint: Checkpoint | None, config: PlanConfig, found: Measurements) -> Plan:
    """Solve the budget and describe the result in all three units. Raises BudgetError if infeasible."""
    choices = config.candidates()
    problem = native_problem(checkpoint, config, found.weights)
    table = cost_table(found.spectra, found.noise, choices, config.gamma, found.weights)
    solution = solve(table, problem.costs, problem.limit, config.method)

    chosen = {name: choices[column] for name, column in zip(table.names, solution.columns, strict=True)}
    units = np.arange(len(table.names))
    parameters = int(found.weights.sum())
    resolved = config.model_copy(update={"noise": resolved_noise(checkpoint, config)})
    unit = next(name for name, value in config.budget.model_dump().items() if value is not None)
    return Plan(
        alphaq_version=alphaq.__version__,
        source=None if checkpoint is None else checkpoint.identity,
        config=resolved.model_dump(mode="json"),
        average_bits=float(found.weights @ [choice.bits for choice in chosen.values()] / parameters),
        bits_per_weight=None
        if problem.block_bytes is None
        else float(8 * problem.block_bytes[units, solution.columns].sum() / parameters),
        size_bytes=None if checkpoint is None else native.size_bytes(checkpoint, problem.fixed | chosen),
        budget_unit=unit,
        budget_slack=float(problem.limit - solution.cost),
        objective=solution.objective,
        lower_bound=solution.lower_bound,
        histogram=dict(sorted(Counter(choice.bits for choice in chosen.values()).items())),
        assignment={name: choice.bits for name, choice in chosen.items()},
        choices={name: str(choice) for name, choice in (chosen | problem.fixed).items()},
        alpha={name: s.alpha for name, s in found.spectra.items() if s.alpha is not None},
        unplanned=found.left_out,
        neutral={name: s.reason for name, s in found.spectra.items() if s.alpha is None},
    )


def quantize(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    restart: bool = False,
    hash_contents: bool = False,
) -> dict[str, Any]:
    """Quantize by a plan, write the native checkpoint, re-read it against the source, then publish it.

    Returns sizes and errors. `out` appears complete or not at all; an interrupted run goes on where it
    was when it is started again with the same checkpoint and plan. Raises OutputError if they differ,
    unless told to `restart`.
    """
    choices = plan_choices(plan, checkpoint)
    size = native.size_bytes(checkpoint, choices)
    if plan.size_bytes not in (None, size):
        raise PlanError(f"The plan promises {plan.size_bytes} bytes but its choices take {size}. Make the plan again.")
    plan = plan.model_copy(update={"size_bytes": size, "source": checkpoint.identity})
    workers = workers or Workers(1, checkpoint)
    job = {
        "checkpoint": f"{checkpoint.fingerprint} {checkpoint.contents(hash_contents)}",
        "plan": hashlib.sha256(plan.to_json().encode()).hexdigest(),
        "alphaq version": alphaq.__version__,
    }
    with resumable_folder(out, job, restart) as (folder, journal):
        done = {
            entry["name"]: TensorRecord.model_validate(entry["record"])
            for entry in journal.entries
            if "record" in entry
        }
        places = create_shards(folder, checkpoint, choices)
        tasks = list(store_tasks(checkpoint, choices, folder, places, done))
        expected = ahead((task for _, task in tasks), partial(_expect, checkpoint))
        records = workers.map(store, expected, lambda task: task.nbytes)
        shards = (shard for shard, _ in tasks)
        results = leaving(zip(shards, records, strict=True), checkpoint.forget)
        manifest: dict[str, TensorRecord] = {}
        weight_map: dict[str, str] = {}
        for (_, task), record in zip(tasks, wrap(results, len(tasks), "quantize"), strict=True):
            manifest[task.place.name] = record
            weight_map[task.place.name] = task.path.name
            if record != task.found:
                journal.append({"name": task.place.name, "record": record.model_dump(exclude_none=True)})
        write_rest(folder, checkpoint, plan, manifest, weight_map)
        checked = verify(folder, checkpoint, wrap, workers)
    return {"out": str(out), "size_bytes": size, "source_bytes": checkpoint.nbytes, **checked}


def _expect(checkpoint: Checkpoint, task: StoreTask) -> None:
    if isinstance(task.source, MatrixRef):
        checkpoint.expect(task.source)


def verify(
    folder: Path, source: Checkpoint | None = None, wrap: Wrap = silent, workers: Workers | None = None
) -> dict[str, Any]:
    """Re-read every tensor against plan and manifest; with the source, against its values too.

    Raises VerificationError naming the first fault.
    """
    opened = NativeFiles(folder)
    raise_faults(folder, check_complete(opened))
    expected: dict[str, TensorSpec] = {}
    sources: dict[str, MatrixRef | str] = {}
    if source is not None:
        choices = plan_choices(opened.plan, source)
        for specs in native.shard_specs(source, choices).values():
            expected.update(specs)
        sources = {name: name for name in source.shard_of} | {
            matrix.name: matrix for matrix in source.matrices if matrix.name in choices
        }
    tasks, faults = [], []
    for shard, infos in opened.shards.items():
        for info in infos.values():
            record = opened.manifest.get(info.name)
            if record is None:
                faults.append(f"{info.name} is not in {MANIFEST_NAME}")
                continue
            choice = opened.plan.choice(info.name) if info.name in opened.plan.choices else None
            tasks.append(
                CheckTask(info, folder / shard, record, choice, sources.get(info.name), expected.get(info.name))
            )
    results = (workers or Workers(1, source)).map(check, tasks, lambda task: task.nbytes)
    if source is not None:
        # Output files mirror the source's, one to one and in order.
        mirrored = dict(zip(opened.shards, source.shards, strict=False))
        shards = (mirrored[task.path.name] for task in tasks)
        results = leaving(zip(shards, results, strict=True), source.forget)
    faults += [fault for fault in wrap(results, len(tasks), "verify") if fault is not None]
    raise_faults(folder, faults)
    errors = [record.relative_error for record in opened.manifest.values() if record.relative_error is not None]
    return {
        "tensors": len(opened.manifest),
        "quantized": len(opened.plan.choices),
        "against_source": source is not None,
        "mean_relative_error": float(np.mean(errors)) if errors else 0.0,
        "max_relative_error": float(np.max(errors)) if errors else 0.0,
    }


def evaluate(
    model: str | Path,
    texts: list[Path],
    reference: str | Path | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    wrap: Wrap = silent,
) -> Fidelity:
    """Perplexity per text, and distance from a reference model if one is given."""
    from alphaq.evaluation.fidelity import evaluate_texts, read_texts
    from alphaq.runtime.loading import load_model

    contents = read_texts(texts)
    loaded, tokenizer = load_model(model, dtype, device)
    against = None
    if reference is not None:
        against, other = load_model(reference, dtype, device)
        if other.get_vocab() != tokenizer.get_vocab():
            raise AlphaQError(
                f"{model} and {reference} have different tokenizers, so no KL is defined. Compare like with like."
            )
    return Fidelity(dict(evaluate_texts(loaded, tokenizer, contents, against, window, max_tokens, wrap)))


def fidelity_json(fidelity: Fidelity) -> dict[str, Any]:
    """What `alphaq eval --json` prints."""
    texts = {
        name: {
            "perplexity": text.perplexity,
            "perplexity_interval": list(text.perplexity_interval),
            "kl": text.kl,
            "top1": text.top1,
            "ear": text.ear,
            "tokens": text.tokens,
        }
        for name, text in fidelity.texts.items()
    }
    return {"texts": texts, "geomean_perplexity": fidelity.geomean_perplexity, "mean_kl": fidelity.mean_kl}


DEMO_RUNS = (("uniform 2", "uniform", 2.0), ("AlphaQ 2.5", "alphaq", 2.5), ("uniform 3", "uniform", 3.0))
DEMO_MAX_TOKENS = 4096


def demo(out: Path, wrap: Wrap = silent) -> dict[str, Any]:
    """The main job on the bundled model: plan, quantize, evaluate, report. Writes `out`."""
    with (
        atomic_folder(out) as folder,
        as_file(files("alphaq") / "data") as data,
        TemporaryDirectory() as scratch,
    ):
        model, texts = data / "tiny", sorted((data / "texts").glob("*.txt"))
        checkpoint = open_checkpoint(model)
        config = PlanConfig(budget=Budget(bits=2.5))
        found = measure_for_plan(checkpoint, config, wrap=wrap)
        rows = [
            _demo_row(
                "bf16",
                16.0,
                16.0,
                checkpoint.nbytes,
                evaluate(model, texts, model, max_tokens=DEMO_MAX_TOKENS),
            )
        ]
        plans = {}
        for label, method, bits in DEMO_RUNS:
            plan = make_plan(
                checkpoint, config.model_copy(update={"budget": Budget(bits=bits), "method": method}), found
            )
            target = folder / "model" if method == "alphaq" else Path(scratch) / label
            written = quantize(checkpoint, plan, target, wrap)
            fidelity = evaluate(target, texts, model, max_tokens=DEMO_MAX_TOKENS, wrap=wrap)
            assert plan.average_bits is not None and plan.bits_per_weight is not None
            rows.append(_demo_row(label, plan.average_bits, plan.bits_per_weight, written["size_bytes"], fidelity))
            plans[label] = plan
        result = {"rows": rows, "report": str(out / "report.html"), "model": str(out / "model")}
        write_report(folder / "report.html", plans["AlphaQ 2.5"], checkpoint.matrices, rows)
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _demo_row(label: str, bits: float, bpw: float, size: int, fidelity: Fidelity) -> dict[str, Any]:
    return {
        "label": label,
        "average_bits": bits,
        "bits_per_weight": bpw,
        "size_bytes": size,
        **fidelity_json(fidelity),
    }
