"""The stages composed: what each command does, as a plain function that a notebook can call too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

import alphaq
from alphaq.allocation.problem import budget_costs, solve
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.checkpoint.writer import atomic_file, atomic_folder
from alphaq.config import Budget, PlanConfig
from alphaq.engines import native
from alphaq.engines.native_files import (
    NativeFiles,
    check_complete,
    check_tensor,
    raise_faults,
    restore,
    write_checkpoint,
)
from alphaq.errors import AlphaQError, PlanError, StatsError
from alphaq.quantization import plan_choices, quantized_tensors, relative_squared_error
from alphaq.records import Choice, Fidelity, MatrixRef, Plan, Spectrum
from alphaq.report.html import write_report
from alphaq.sensitivity.costs import cost_table
from alphaq.sensitivity.distortion import analytic_noise, measured_noise
from alphaq.spectra.measure import measure, read_stats, spectrum, write_stats

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


def analyze(checkpoint: Checkpoint, out: Path, wrap: Wrap = silent) -> list[tuple[MatrixRef, Spectrum]]:
    """Measure every matrix and write the stats CSV."""
    matrices = checkpoint.matrices
    rows = list(wrap(measure(checkpoint, matrices), len(matrices), "analyze"))
    with atomic_file(out) as partial:
        write_stats(partial, rows)
    return rows


def measure_for_plan(
    checkpoint: Checkpoint | None, config: PlanConfig, stats: Path | None = None, wrap: Wrap = silent
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
    spectra, noise_rows = {}, []
    for matrix in wrap(matrices, len(matrices), "measure"):
        if given is not None and matrix.name not in given.spectra:
            reason = given.left_out.get(matrix.name, "no row")
            raise StatsError(f"{stats} has no usable row for {matrix.name!r} ({reason}). Analyze this model again.")
        weight = checkpoint.read(matrix)
        found = given.spectra[matrix.name] if given is not None else spectrum(weight, matrix.name)
        spectra[matrix.name] = found
        noise_rows.append(
            analytic_noise(found, choices) if noise_kind == "analytic" else measured_noise(weight, choices, matrix.name)
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


def quantize(checkpoint: Checkpoint, plan: Plan, out: Path, wrap: Wrap = silent) -> dict[str, Any]:
    """Quantize by a plan, write the native checkpoint, re-read it against the source, then publish it.

    Returns sizes and errors. Nothing is left behind if anything fails.
    """
    choices = plan_choices(plan, checkpoint)
    size = native.size_bytes(checkpoint, choices)
    if plan.size_bytes not in (None, size):
        raise PlanError(f"The plan promises {plan.size_bytes} bytes but its choices take {size}. Make the plan again.")
    plan = plan.model_copy(update={"size_bytes": size, "source": checkpoint.identity})
    shards = len(checkpoint.shards)
    with atomic_folder(out) as folder:

        def stream(shard: str) -> Iterable[Any]:
            count = len(checkpoint.shards[shard])
            return wrap(quantized_tensors(checkpoint, choices, shard), count, "quantize" if shards == 1 else shard)

        write_checkpoint(folder, checkpoint, plan, choices, stream)
        checked = verify(folder, checkpoint, wrap)
    return {"out": str(out), "size_bytes": size, "source_bytes": checkpoint.nbytes, **checked}


def verify(folder: Path, source: Checkpoint | None = None, wrap: Wrap = silent) -> dict[str, Any]:
    """Re-read every tensor against plan and manifest; with the source, against its values too.

    Raises VerificationError naming the first fault.
    """
    opened = NativeFiles(folder)
    raise_faults(folder, check_complete(opened))
    faults: list[str] = []
    expected: dict[str, TensorSpec] = {}
    matrices: dict[str, MatrixRef] = {}
    if source is not None:
        choices = plan_choices(opened.plan, source)
        expected = {
            name: spec for shard in native.shard_specs(source, choices).values() for name, spec in shard.items()
        }
        matrices = {matrix.name: matrix for matrix in source.matrices}
    errors = []
    for info, raw in wrap(opened.tensors(), len(opened.manifest), "verify"):
        fault = check_tensor(opened, info, raw, expected.get(info.name))
        agreed = opened.manifest[info.name].relative_error if info.name in opened.manifest else None
        if fault is None and agreed is not None:
            errors.append(agreed)
        if fault is None and source is not None:
            block = info.name in opened.plan.choices and opened.plan.choice(info.name).bits != 16
            original = source.read(matrices[info.name]) if info.name in matrices else source.tensor(info.name)
            error = relative_squared_error(original, restore(info, raw, block))
            if abs(error - (agreed or 0.0)) > 1e-6 * (1 + (agreed or 0.0)):
                fault = f"{info.name} has relative error {error:.3g} against its source, not {agreed or 0:.3g}"
        if fault is not None:
            faults.append(fault)
    raise_faults(folder, faults)
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
