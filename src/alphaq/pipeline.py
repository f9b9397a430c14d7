"""The stages composed: what each command does, as a plain function that a notebook can call too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import alphaq
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
from alphaq.errors import AlphaQError, PlanError
from alphaq.measurement import ahead, leaving, measure
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.quantization import CheckTask, StoreTask, check, plan_choices, store, store_tasks
from alphaq.records import Fidelity, MatrixRef, Plan, Spectrum
from alphaq.report.html import write_report
from alphaq.spectra.measure import write_stats
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant
from alphaq.workers import Workers

T = TypeVar("T")
Wrap = Callable[[Iterable[T], int, str], Iterable[T]]
"""`wrap(items, total, label)` yields the items, showing progress or not."""


def silent(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """No progress shown."""
    return items


def analyze(
    checkpoint: Checkpoint,
    out: Path,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    cache: Cache | None = None,
    device: str = "cpu",
    variant: SpectrumVariant = FAST_VARIANT,
) -> list[tuple[MatrixRef, Spectrum]]:
    """Measure every matrix and write the stats CSV."""
    matrices = checkpoint.matrices
    found = measure(matrices, workers or Workers(1, checkpoint), cache, device=device, variant=variant)
    rows = [
        (matrix, one.spectrum)
        for matrix, one in zip(matrices, wrap(found, len(matrices), "analyze"), strict=True)
        if one.spectrum is not None
    ]
    with atomic_file(out) as unfinished:
        write_stats(unfinished, rows)
    return rows


def quantize(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    restart: bool = False,
    hash_contents: bool = False,
    shared: Path | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Quantize by a plan, write the native checkpoint, re-read it against the source, then publish it.

    shared: a folder in which runs on the same checkpoint leave quantized matrices to one another. check: False leaves
    out the re-reading, for files that are only looked at once.

    Returns sizes and errors. `out` appears complete or not at all; an interrupted run goes on where it
    was when it is started again with the same checkpoint and plan. Raises OutputError if they differ,
    unless told to `restart`.
    """
    if plan.engine != native.PROFILE.name:
        raise PlanError(
            f"The plan is for {plan.engine}; this version writes native checkpoints only. Plan with --engine native."
        )
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
        tasks = list(store_tasks(checkpoint, choices, folder, places, done, shared))
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
        checked = verify(folder, checkpoint, wrap, workers) if check else {}
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
        "mean_relative_error": sum(errors) / len(errors) if errors else 0.0,
        "max_relative_error": max(errors, default=0.0),
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


DEMO_RUNS = (("uniform 2", "uniform", 2.0), ("AlphaQ 2.5", "auto", 2.5), ("uniform 3", "uniform", 3.0))
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
        found = measure_for_plan(checkpoint, resolve(config), wrap=wrap)
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
            request = resolve(config.model_copy(update={"budget": Budget(bits=bits), "method": method}))
            plan = make_plan(checkpoint, request, found)
            target = folder / "model" if method == "auto" else Path(scratch) / label
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
