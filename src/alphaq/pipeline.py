"""The stages composed: what each command does, as a plain function that a notebook can call too."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import alphaq
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.checkpoint.publishing import claim, publish
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.remote import Store
from alphaq.checkpoint.writer import Place, atomic_file, atomic_folder, create_file, resumable_folder
from alphaq.engines.export import Entry, Layout
from alphaq.engines.output import (
    MANIFEST_NAME,
    Output,
    Record,
    coded_with,
    header_of,
    raise_faults,
    write_manifest,
)
from alphaq.engines.profiles import profile
from alphaq.errors import OutputError, PlanError
from alphaq.measuring.cache import Cache
from alphaq.measuring.density import Density, DensityTask, density_one
from alphaq.measuring.measurement import Wanted, ahead, leaving, measure
from alphaq.nouns.choice import CODECS
from alphaq.nouns.fidelity import Fidelity
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.nouns.spectrum import Spectrum
from alphaq.planning import checked_plan, measure_for_plan, resolve
from alphaq.planning import make_plan as make_plan
from alphaq.quantizers.base import QUANTIZERS
from alphaq.report.content import MAX_DENSITIES, Sources, sampled
from alphaq.report.html import write_report
from alphaq.report.places import places_of_matrices
from alphaq.report.runs import ComparedRow, read_run
from alphaq.spectra.measure import write_stats
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant
from alphaq.work.journal import Journal
from alphaq.work.resources import Resources
from alphaq.work.workers import Workers, Wrap, silent
from alphaq.writing.calibrated import Rounding, store_calibrated
from alphaq.writing.recoding import recode_into
from alphaq.writing.tasks import CheckTask, StoreTask, checked, plan_choices, stored

if TYPE_CHECKING:
    from alphaq.evaluation.certificate import Certificate
    from alphaq.evaluation.engine_run import EngineRun
    from alphaq.evaluation.tasks import TaskRequest

UPLOADED_NAME = "uploaded.jsonl"


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
    found = measure(checkpoint, matrices, Wanted(variant), Resources(workers, cache, device=device))
    rows = [
        (matrix, one.spectrum)
        for matrix, one in zip(matrices, wrap(found, len(matrices), "analyze"), strict=True)
        if one.spectrum is not None
    ]
    with atomic_file(out) as unfinished:
        write_stats(unfinished, rows)
    return rows


def check_source(checkpoint: Checkpoint, engine: str) -> None:
    """Raise PlanError if the engine's files need what the source lacks."""
    if checkpoint.gguf is not None and not profile(engine).writer.from_gguf:
        raise PlanError(
            f"{checkpoint.name} is a GGUF file, whose tokenizer and config only --engine llama.cpp carries over. Start "
            f"from the Hugging Face folder for {engine}."
        )


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
    imatrix: ImportanceMatrix | None = None,
    rounding: Rounding | None = None,
) -> dict[str, Any]:
    """Quantize by a plan, write what its engine loads, re-read it against the source, then publish it.

    A plan with a codec is carried out beside `out` first, then coded into it.

    shared: a folder in which runs on the same checkpoint leave quantized matrices to one another. check: False leaves
    out the re-reading, for files that are only looked at once. rounding: the engine's usual one by default.

    Returns sizes and errors. `out` appears complete or not at all; an interrupted run goes on where it
    was when it is started again with the same checkpoint and plan. Raises OutputError if they differ,
    unless told to `restart`.
    """
    if (codec := coded_with(plan)) is not None:
        plain = plan.model_copy(update={"size_bytes": None, "config": {**plan.config, "codec": CODECS[0]}})
        settings = (wrap, workers, restart, hash_contents, shared, check, imatrix, rounding)
        return _quantize_coded(checkpoint, plain, out, codec, plan.size_bytes, settings)
    writer = profile(plan.engine).writer
    check_source(checkpoint, plan.engine)
    choices = plan_choices(plan, checkpoint)
    planned = plan.config.get("imatrix") or ""
    if planned.rpartition(" ")[2] != (imatrix.digest if imatrix else "") and (plan.config or imatrix is not None):
        raise PlanError(
            f"The plan was made with the importance matrix {planned or 'of ones'}, not with "
            f"{imatrix.name if imatrix else 'one of ones'}. Give --imatrix the same file, or make the plan again."
        )
    importance = profile(plan.engine).importance_of(checkpoint, imatrix)
    rounding = rounding or Rounding.of(plan.engine)
    written = writer.layout(checkpoint, choices)
    if plan.size_bytes not in (None, written.size_bytes):
        raise PlanError(
            f"The plan promises {plan.size_bytes} bytes but its choices take {written.size_bytes}. Make the plan again."
        )
    plan = plan.model_copy(update={"size_bytes": written.size_bytes, "source": checkpoint.identity})
    workers = workers or Workers(1, checkpoint)
    job = _job(checkpoint, plan, rounding, hash_contents)
    left: dict[str, str] = {}
    with resumable_folder(out, job, restart) as (folder, journal):
        done = {entry["name"]: Record.model_validate(entry["record"]) for entry in journal.entries if "record" in entry}
        for file, (header, nbytes) in written.files.items():
            create_file(folder / file, header, nbytes)
        tasks = [
            StoreTask(
                entry,
                plan.engine,
                folder,
                rounding.plain,
                done.get(entry.name),
                shared,
                importance.columns.get(entry.name),
            )
            for entry in written.entries
        ]
        if rounding.calibrated is not None:
            tasks, left = _calibrated(checkpoint, tasks, rounding, journal, wrap)
        expected = tasks if workers.cluster else ahead(tasks, partial(_expect, checkpoint))
        records = stored(workers, tasks, expected)
        results = leaving(
            zip((_shard(checkpoint, task.entry) for task in tasks), records, strict=True), checkpoint.forget
        )
        manifest: dict[str, Record] = {}
        for task, record in zip(tasks, wrap(results, len(tasks), "quantize"), strict=True):
            manifest[task.entry.name] = record
            if record != task.found:
                _note(journal, task, record)
        writer.write_rest(folder, checkpoint, plan, written)
        headers = {file: header_of(header) for file, (header, _) in written.files.items()}
        write_manifest(folder, plan, manifest, headers, rounding.options(plan.engine, checkpoint.pre_tokenizer))
        found = verify(folder, checkpoint, wrap, workers) if check else {}
        checkpoint.require_unchanged()
    files = [str(out / file) for file in written.files]
    return {
        "out": str(out),
        "files": files,
        "size_bytes": written.size_bytes,
        "source_bytes": checkpoint.nbytes,
        "quantizer": rounding.name,
        "not_calibrated": left,
        "notes": list(writer.side_notes(checkpoint)),
        **found,
    }


def _quantize_coded(
    checkpoint: Checkpoint, plan: Plan, out: Path, codec: str, promised: int | None, settings: tuple[Any, ...]
) -> dict[str, Any]:
    """`quantize` by a plan without a codec, then code what it wrote. `settings`: the other arguments of `quantize`.

    Both happen inside the folder of one unfinished run, so that another run can neither mix with it nor disturb it.
    """
    if plan.engine != "native":
        raise PlanError(f"{plan.engine} reads no coded tensors. Drop --codec, or use --engine native.")
    wrap, workers, restart, hash_contents, *_, rounding = settings
    rounding = rounding or Rounding.of(plan.engine)
    check_codable(rounding)
    settings = (*settings[:-1], replace(rounding, coded=rounding.calibrated is not None))
    job = _job(checkpoint, plan, rounding, hash_contents) | {"codec": codec}
    with resumable_folder(out, job, restart) as (folder, journal):
        uncoded = folder.parent / "uncoded"
        result = next((entry["uncoded"] for entry in journal.entries if "uncoded" in entry), None)
        if result is None:
            shutil.rmtree(uncoded, ignore_errors=True)
            result = quantize(checkpoint, plan, uncoded, *settings)
            journal.append({"uncoded": result})
        local = None if workers is None or workers.cluster else workers  # whose nodes may not have the folder
        coded = recode_into(uncoded, folder, codec, wrap, local)
        raise_faults(folder, Output(folder).faults())
        if promised is not None and coded["size_bytes"] > promised:
            raise PlanError(
                f"Coded, the files take {coded['size_bytes']} bytes, more than the {promised} that the plan promises: "
                "it was made with another zstandard. Plan again here, or raise the budget, and add --restart."
            )
        files = [str(out / file) for file in Output(folder).headers]
    return {**result, **coded, "out": str(out), "files": files, "source_bytes": checkpoint.nbytes}


def check_codable(rounding: Rounding) -> None:
    """PlanError if what a quantizer's codes take once coded cannot be held to what a plan says."""
    if not all(QUANTIZERS[name].coded_size_known for name in (rounding.plain, rounding.name)):
        raise PlanError(
            f"What codes of quantizer {rounding.name} will take is not known to a plan. Use --quantizer gptq, or "
            "quantize without --codec and code the result with `alphaq recode`."
        )


def _job(checkpoint: Checkpoint, plan: Plan, rounding: Rounding, hash_contents: bool) -> dict[str, str]:
    """What an output depends on."""
    job = {
        "checkpoint": f"{checkpoint.fingerprint} {checkpoint.contents(hash_contents)}",
        "plan": hashlib.sha256(plan.to_json().encode()).hexdigest(),
        "alphaq version": alphaq.__version__,
        "quantizer": str(rounding),
    }
    return job if rounding.calibrated is None else job | {"model settings": checkpoint.settings_digest()}


def quantize_to_store(
    checkpoint: Checkpoint,
    plan: Plan,
    store: Store,
    scratch: Path,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    restart: bool = False,
    hash_contents: bool = False,
    imatrix: ImportanceMatrix | None = None,
    rounding: Rounding | None = None,
) -> dict[str, Any]:
    """`quantize` into a folder in `scratch`, then upload it, then remove it there.

    Started again with the same checkpoint and plan, an interrupted run goes on where it was, be it while quantizing or
    while uploading. Raises OutputError if another job is unfinished there, unless told to `restart`.
    """
    rounding = rounding or Rounding.of(plan.engine)
    given = [
        *(checkpoint.fingerprint, checkpoint.contents(hash_contents), checkpoint.settings_digest()),
        *(plan.to_json(), alphaq.__version__, str(rounding), "" if imatrix is None else imatrix.digest),
    ]
    job = hashlib.sha256("\0".join(given).encode()).hexdigest()
    staging = scratch / f".{store.name}.upload-{hashlib.sha256(store.url.encode()).hexdigest()[:12]}"
    out = staging / store.name
    try:
        staging.mkdir(exist_ok=True)
        run = Journal(staging / "run.jsonl")  # no other run may be at work here
    except OSError as error:
        raise OutputError(f"Cannot write {staging}: {error.strerror or error}. Choose another --scratch.") from error
    with run:
        earlier = next((entry["job"] for entry in run.entries if "job" in entry), job)
        if earlier != job and not restart:
            raise OutputError(
                f"An unfinished run for {store.url} is in {staging}, of another checkpoint or plan. Repeat the earlier "
                "command to finish it, or add --restart to discard it."
            )
        if earlier != job or restart:
            for path in staging.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name == UPLOADED_NAME:
                    path.unlink()
            run.clear()
        if not run.entries:
            run.append({"job": job})
        claim(store, job, restart)
        result = next((entry["result"] for entry in run.entries if "result" in entry), None)
        if result is None or not out.exists():
            if out.exists():  # the process was killed between the two
                shutil.rmtree(out)
            result = quantize(
                checkpoint, plan, out, wrap, workers, False, hash_contents, imatrix=imatrix, rounding=rounding
            )
            result["files"] = [f"{store.url}/{Path(file).name}" for file in result["files"]]
            result["out"] = store.url
            run.append({"result": result})
        publish(out, store, job, staging / UPLOADED_NAME, wrap)
        shutil.rmtree(staging, ignore_errors=True)
    return result


def _note(journal: Journal, task: StoreTask, record: Record) -> None:
    journal.append({"name": task.entry.name, "record": record.model_dump(exclude_none=True)})


def _calibrated(
    checkpoint: Checkpoint, tasks: list[StoreTask], rounding: Rounding, journal: Journal, wrap: Wrap
) -> tuple[list[StoreTask], dict[str, str]]:
    """The tasks with what was found by looking at inputs; which matrices were not calibrated, and why."""
    assert rounding.calibrated is not None and rounding.inputs is not None  # a text goes with it
    rounded = (task.entry for task in tasks if task.entry.choice is not None and not task.entry.choice.kept)
    waiting = {entry.name for entry in rounded}
    bar = iter(wrap(range(len(waiting)), len(waiting), f"quantize ({rounding.name})"))
    records: dict[str, Record] = {}

    def keep(task: StoreTask, record: Record) -> None:
        next(bar, None)
        records[task.entry.name] = record
        if record != task.found:
            _note(journal, task, record)

    left = store_calibrated(checkpoint, tasks, rounding, keep)
    for _ in bar:  # which ends it
        pass
    for name in waiting - records.keys():
        left[name] = "its inputs are not seen where the model's class computes with it"
    return [replace(task, found=records.get(task.entry.name, task.found)) for task in tasks], left


def _shard(checkpoint: Checkpoint, entry: Entry) -> str:
    return checkpoint.shard_of[entry.source if isinstance(entry.source, str) else entry.source.tensor]


def _expect(checkpoint: Checkpoint, task: StoreTask) -> None:
    if isinstance(task.entry.source, MatrixRef):
        checkpoint.expect(task.entry.source)


def verify(
    folder: Path, source: Checkpoint | None = None, wrap: Wrap = silent, workers: Workers | None = None
) -> dict[str, Any]:
    """Re-read every tensor against plan and manifest; with the source, against its values too.

    Raises VerificationError naming the first fault.
    """
    opened = Output(folder)
    raise_faults(folder, opened.faults())
    entries: dict[str, Entry] = {}
    if source is not None:
        # What tells files apart by their header only, a folder's name say, is not compared; so any rule does here.
        unnamed = replace(source, pre_tokenizer=source.pre_tokenizer or "default")
        written = opened.profile.writer.layout(unnamed, plan_choices(opened.plan, source))
        entries = {entry.name: entry for entry in written.entries}
        raise_faults(folder, [*_differences(opened, written)])
    tasks = [
        CheckTask(
            name,
            opened.plan.engine,
            folder,
            record,
            entries[name].choice if entries else opened.choice(name),
            tuple(opened.stored[tensor] for tensor, _ in opened.parts(name)),
            opened.places(name),
            entries.get(name),
        )
        for name, record in _in_order(opened.manifest, entries)
    ]
    results: Iterable[str | None] = checked(workers or Workers(1, source), tasks)
    if source is not None:
        shards = (_shard(source, entries[task.name]) for task in tasks)
        results = leaving(zip(shards, results, strict=True), source.forget)
    raise_faults(folder, [fault for fault in wrap(results, len(tasks), "verify") if fault is not None])
    errors = [record.relative_error for record in opened.manifest.values() if record.relative_error is not None]
    expected = opened.plan.expected_error
    real = [opened.manifest[name].relative_error or 0.0 for name in expected]
    return {
        "tensors": len(opened.manifest),
        "quantized": len(opened.plan.choices),
        "against_source": source is not None,
        "mean_relative_error": sum(errors) / len(errors) if errors else 0.0,
        "max_relative_error": max(errors, default=0.0),
        "mean_relative_error_planned": sum(real) / len(real) if real else None,
        "mean_relative_error_expected": sum(expected.values()) / len(expected) if expected else None,
    }


def verify_run(folder: Path, source: Checkpoint | None = None) -> EngineRun:
    """Run a folder in its engine and compare the logits of a few tokens with those of its restored weights.

    Raises as `evaluation.engine_run.run_in_engine` does.
    """
    from alphaq.evaluation.engine_run import run_in_engine

    return run_in_engine(folder, source)


def _in_order(manifest: dict[str, Record], entries: dict[str, Entry]) -> list[tuple[str, Record]]:
    """Manifest entries in the order of the source files, where those are known."""
    return [(name, manifest[name]) for name in entries] if entries else list(manifest.items())


def _differences(opened: Output, written: Layout) -> Iterable[str]:
    """What is not where, or not of the form, that the plan makes of the source."""
    for entry in written.entries:
        if entry.name not in opened.manifest:
            yield f"{entry.name} is not in {MANIFEST_NAME}"
        elif opened.parts(entry.name) != entry.parts or (
            not opened.codec and _sizes(opened.places(entry.name)) != _sizes(entry.places)
        ):
            found = [f"{one.dtype} {list(one.shape)}" for one in map(opened.stored.get, dict(entry.parts)) if one]
            yield f"{entry.name} is {' and '.join(found)}, which is not what the plan makes of the source"
    extra = opened.manifest.keys() - {entry.name for entry in written.entries}
    yield from (f"{name} is not of the source" for name in sorted(extra))


def _sizes(places: Iterable[Place]) -> list[int]:
    return [place.nbytes for place in places]


def evaluate(
    model: str | Path,
    texts: list[Path],
    reference: str | Path | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    wrap: Wrap = silent,
    bos: bool = True,
) -> Fidelity:
    """Perplexity per text, and distance from a reference model if one is given.

    bos: each window begins with what the tokenizer puts before a text, where it does.
    """
    from alphaq.evaluation.fidelity import evaluate_texts, read_texts, window_beginning
    from alphaq.runtime.loading import load_pair

    contents = read_texts(texts)
    loaded, against, tokenizer = load_pair(model, reference, dtype, device)
    found = dict(evaluate_texts(loaded, tokenizer, contents, against, window, max_tokens, wrap, bos))
    return Fidelity(found, window_beginning(tokenizer, bos))


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
    begins = {"windows_begin_with": fidelity.begins_with}
    return {"texts": texts, **begins, "geomean_perplexity": fidelity.geomean_perplexity, "mean_kl": fidelity.mean_kl}


def certify(
    model: str | Path,
    reference: str | Path,
    texts: list[Path],
    window: int = 512,
    max_tokens: int | None = None,
    skip_tokens: int = 0,
    device: str | None = None,
    dtype: str = "float32",
    threshold: float = 0.99,
    tasks: TaskRequest | None = None,
    command: str = "",
    wrap: Wrap = silent,
    bos: bool = True,
) -> Certificate:
    """Measure how faithful a model is to its reference, and put it on record. tasks: of lm-eval, to run on both.

    Raises AlphaQError if they have different tokenizers, or a text is too short for an interval.
    """
    from alphaq.evaluation import certificate as record
    from alphaq.evaluation.fidelity import Remembered, read_texts, score_texts, window_beginning
    from alphaq.evaluation.tasks import certify_tasks, find_tasks
    from alphaq.runtime.loading import load_pair

    contents = read_texts(texts)
    manager = None if tasks is None else find_tasks(tasks)
    identities = [record.identity_of(one) for one in (model, reference)]
    loaded, against, tokenizer = load_pair(model, reference, dtype, device)
    scores = dict(
        score_texts(loaded, tokenizer, contents, Remembered(against), window, max_tokens, skip_tokens, wrap, bos)
    )
    overall, each = record.text_figures(scores, contents)
    done = None if tasks is None else certify_tasks(loaded, against, tokenizer, tasks, manager, wrap)
    return record.Certificate(
        alphaq_version=alphaq.__version__,
        versions=record.versions(*(["lm-eval"] if tasks else [])),
        command=command,
        model=identities[0],
        reference=identities[1],
        settings=record.Settings(
            window=window,
            max_tokens=max_tokens,
            skip_tokens=skip_tokens,
            dtype=dtype,
            computed_in=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
            begins_with=window_beginning(tokenizer, bos),
        ),
        texts=each,
        overall=overall,
        threshold=threshold,
        distribution_lossless=overall.ear.verdict(threshold),
        tasks=done,
    )


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
        found = measure_for_plan(checkpoint, resolve(config), resources=Resources(wrap=wrap))
        rows = [
            _demo_row(
                "bf16",
                16.0,
                16.0,
                checkpoint.nbytes,
                evaluate(model, texts, model, max_tokens=DEMO_MAX_TOKENS),
            )
        ]
        for label, method, bits in DEMO_RUNS:
            request = resolve(config.model_copy(update={"budget": Budget(bits=bits), "method": method}))
            plan = checked_plan(checkpoint, request, found)
            target = folder / "model" if method == "auto" else Path(scratch) / label
            written = quantize(checkpoint, plan, target, wrap)
            fidelity = evaluate(target, texts, model, max_tokens=DEMO_MAX_TOKENS, wrap=wrap)
            assert plan.average_bits is not None and plan.bits_per_weight is not None
            rows.append(_demo_row(label, plan.average_bits, plan.bits_per_weight, written["size_bytes"], fidelity))
        result = {"rows": rows, "report": str(out / "report.html"), "model": str(out / "model")}
        made = read_run(folder / "model")
        sources = Sources(
            places_of_matrices(checkpoint.matrices),
            "the model",
            densities=dict(densities(checkpoint, made.plan, wrap=wrap)),
            compared=[_compared(row) for row in rows],
        )
        write_report(folder / "report.html", made, sources)
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def densities(
    checkpoint: Checkpoint,
    plan: Plan,
    limit: int = MAX_DENSITIES,
    wrap: Wrap = silent,
    workers: Workers | None = None,
) -> Iterable[tuple[str, Density]]:
    """Densities of eigenvalues of planned matrices, of at most `limit`, by the plan's own way to measure α.

    Raises PlanError if the checkpoint is not the one that was planned for.
    """
    if plan.source is None or plan.source.fingerprint != checkpoint.fingerprint:
        whose = f"{plan.source.name} with other tensors" if plan.source else "a stats file"
        raise PlanError(f"The plan was made of {whose}, not of {checkpoint.name}. Give the checkpoint it was made of.")
    variant = SpectrumVariant(str(plan.config.get("spectrum", "farms")), str(plan.config.get("tail", "hill")))  # type: ignore[arg-type]
    known = {matrix.name: matrix for matrix in checkpoint.matrices}
    tasks = [DensityTask(known[name], variant) for name in sampled(plan, limit)]
    found = (workers or Workers(1, checkpoint)).map(density_one, tasks, lambda task: 10 * task.matrix.parameters)
    yield from zip((task.matrix.name for task in tasks), wrap(found, len(tasks), "spectra"), strict=True)


def _compared(row: dict[str, Any]) -> ComparedRow:
    """A run of the demo as a row of a comparison."""
    method = next((method for label, method, _ in DEMO_RUNS if label == row["label"]), "reference")
    bits = next((bits for label, _, bits in DEMO_RUNS if label == row["label"]), 16.0)
    return ComparedRow(
        method=method,
        bits=bits,
        size_bytes=row["size_bytes"],
        average_bits=row["average_bits"],
        bits_per_weight=row["bits_per_weight"],
        perplexity={name: text["perplexity"] for name, text in row["texts"].items()},
        mean_perplexity=row["geomean_perplexity"],
        kl=row["mean_kl"],
    )


def _demo_row(label: str, bits: float, bpw: float, size: int, fidelity: Fidelity) -> dict[str, Any]:
    return {
        "label": label,
        "average_bits": bits,
        "bits_per_weight": bpw,
        "size_bytes": size,
        **fidelity_json(fidelity),
    }
