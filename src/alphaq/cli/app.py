"""The command line: arguments to config to pipeline, and nothing else.

With `--json` exactly one object goes to stdout; progress, tables and errors go to stderr. A user's
mistake ends with one line and exit code 2.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from alphaq import __version__
from alphaq.cli.certify import card, certify
from alphaq.cli.options import (
    ANY_BUDGET,
    BosOption,
    JsonOption,
    ModelArgument,
    RevisionOption,
    WorkersOption,
    build_plan,
    check_dtype,
    given_options,
    importance_matrix,
    means_for,
    means_settings,
    note,
    note_folders,
    note_source,
    opened,
    output_target,
    plan_config,
    plan_settings,
    read_plan,
    rounding_of,
    search_plan,
    search_settings,
    search_target,
    show_outline,
    text_of,
    with_options,
)
from alphaq.cli.plot import plot
from alphaq.cli.quantizers import quantizers
from alphaq.cli.recode import recode
from alphaq.cli.report import report
from alphaq.cli.slice import slice_
from alphaq.errors import AlphaQError, BudgetError
from alphaq.nouns.choice import CODECS
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import ProxyKind
from alphaq.terminal import err, progress, show

app = typer.Typer(
    name="alphaq",
    help="Fit Mixture-of-Experts models into the memory you have, without calibration data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def inspect(model: ModelArgument, revision: RevisionOption = None, as_json: JsonOption = False) -> None:
    """Show a checkpoint's architecture, roles, counts and sizes; reads headers only."""
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.checkpoint.summary import summarize
    from alphaq.report.tables import inspect_table

    checkpoint = open_checkpoint(model, revision, headers_only=True)
    note(checkpoint.notes)
    summary = summarize(checkpoint)
    show(as_json, summary, inspect_table(summary))


@app.command()
@with_options(means=means_settings)
def analyze(
    model: ModelArgument,
    means: Any,
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV to write.")] = Path("stats.csv"),
    spectrum: Annotated[str, typer.Option(help="Eigenvalues of farms (blocks) or of the whole matrix.")] = "farms",
    tail: Annotated[str, typer.Option(help="Where the tail starts: hill, median, finger or ks.")] = "hill",
    as_json: JsonOption = False,
) -> None:
    """Measure every matrix's weight spectrum and write one CSV row each."""
    from alphaq import pipeline
    from alphaq.checkpoint.writer import check_file
    from alphaq.report.bitmap import alpha_histogram
    from alphaq.spectra.variants import SpectrumVariant

    variant = SpectrumVariant(spectrum, tail)  # type: ignore[arg-type]
    check_file(output)
    checkpoint = opened(model, means)
    with means_for(checkpoint, **means) as (pool, cache):
        rows = pipeline.analyze(checkpoint, output, progress, pool, cache, means["device"], variant)
    alphas = sorted(found.alpha for _, found in rows if found.alpha is not None)
    summary = {
        "model": checkpoint.name,
        "output": str(output),
        "matrices": len(rows),
        "alpha_undefined": len(rows) - len(alphas),
        "alpha_min": alphas[0] if alphas else None,
        "alpha_median": alphas[len(alphas) // 2] if alphas else None,
        "alpha_max": alphas[-1] if alphas else None,
    }
    spread = (
        f"α {alphas[0]:.3f} – {alphas[-1]:.3f}, median {alphas[len(alphas) // 2]:.3f}" if alphas else "no α defined"
    )
    show(
        as_json,
        summary,
        f"{len(rows)} matrices measured into {output}: {spread}",
        lambda console: alpha_histogram(alphas, console),
    )


@app.command()
@with_options(settings=plan_settings, search=search_settings, means=means_settings)
def plan(
    context: typer.Context,
    settings: Any,
    search: Any,
    means: Any,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plan file to write.")] = None,
    write_type_file: Annotated[
        Path | None,
        typer.Option(help="Also write the types for `llama-quantize --tensor-type-file` (engine llama.cpp)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check budget and engine by shapes; reads and fetches headers alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose bits for every expert matrix under a budget; shows the plan, and writes it with -o."""
    given = given_options(context)
    target = search_target(search, settings, given, means["device"] if "device" in given else None)
    config = plan_config(settings if target is None else settings | {"bpw": ANY_BUDGET}, model is not None)
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.engines.profiles import profile
    from alphaq.report.bitmap import bit_map
    from alphaq.report.places import places_of_matrices
    from alphaq.report.tables import plan_table

    for file in (output, write_type_file, search["curve"]):
        if file is not None:
            check_file(file)
    type_file = profile(config.engine).writer.type_file
    if write_type_file is not None and (model is None or type_file is None):
        raise AlphaQError("--write-type-file is for llama.cpp and needs the model. Add MODEL and --engine llama.cpp.")
    if target is not None and model is None:
        raise BudgetError("--ear runs the model. Give MODEL.")
    if dry_run:
        if model is None or target is not None or output is not None or write_type_file is not None:
            raise AlphaQError("--dry-run needs MODEL and makes no plan. Drop --output, --write-type-file and --ear.")
        show_outline(opened(model, means, headers_only=True), config, as_json)
        return
    checkpoint: Any = None if model is None else opened(model, means)
    with means_for(checkpoint, **means) as (pool, cache):
        if target is None:
            made = build_plan(checkpoint, config, settings, pool, cache, means["device"])
        else:
            beside = output or search["curve"]
            scratch = None if beside is None else beside.absolute().parent
            made = search_plan(
                checkpoint, config, settings, search, target, pool, cache, means["device"], scratch=scratch
            )
    if write_type_file is not None:
        with atomic_file(write_type_file) as partial:
            assert checkpoint is not None and type_file is not None  # checked above
            partial.write_text(type_file(checkpoint, made.every_choice()), encoding="utf-8")
        err.print(f"Types written to {write_type_file}", markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        with atomic_file(output) as partial:
            partial.write_text(made.to_json(), encoding="utf-8")
        err.print(f"Plan written to {output}", markup=False, highlight=False, soft_wrap=True)
    places = None if checkpoint is None else places_of_matrices(checkpoint.matrices)
    show(
        as_json,
        made.model_dump(mode="json", exclude={"table"}),
        plan_table(made),
        lambda console: bit_map(made, console, places),
    )


@app.command()
@with_options(settings=plan_settings, search=search_settings, means=means_settings)
def quantize(
    context: typer.Context,
    model: ModelArgument,
    settings: Any,
    search: Any,
    means: Any,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write, also as an address (s3://...); must not exist.")
    ],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Use this plan instead of making one.")] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(help="How codes are found (see `alphaq quantizers`); the engine's usual way by default."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that gptq and learned look at; enough for the experts by default.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")
    ] = False,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what is to be uploaded, where the output is an address; the current one by default."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan and quantize a checkpoint, then re-read the result against the source."""
    from alphaq.checkpoint.writer import check_absent, check_file
    from alphaq.engines.profiles import profile
    from alphaq.report.tables import human_bytes, plan_table
    from alphaq.report.verified import run_hint

    place = output_target(output, scratch)
    if isinstance(place, Path):
        check_absent(place)
    given, target = given_options(context), None
    if plan_file is not None:
        made = read_plan(plan_file, settings, given & {*settings, *search, "no_cache", "device"})
    else:
        target = search_target(search, settings, given, means["device"] if "device" in given else None)
        config = plan_config(settings if target is None else settings | {"bpw": ANY_BUDGET})
        if search["curve"] is not None:
            check_file(search["curve"])
    from alphaq import pipeline
    from alphaq.quantizers.base import looks_at_inputs

    checkpoint = opened(model, means)
    engine = made.engine if plan_file is not None else config.engine
    pipeline.check_source(checkpoint, engine)
    planned_on_text = plan_file is None and config.calibration is not None
    source = None if planned_on_text and not looks_at_inputs(quantizer) else settings["calibration"]
    bos = settings["bos"] and (plan_file is None or made.config.get("bos", True))
    rounding = rounding_of(checkpoint, engine, quantizer, source, calibration_tokens, bos)
    if (made.config.get("codec") if plan_file is not None else config.codec) not in (None, CODECS[0]):
        pipeline.check_codable(rounding)
    imatrix = importance_matrix(settings["imatrix"])
    if plan_file is not None:
        note_source(checkpoint, engine, imatrix)
    means["no_cache"] |= plan_file is not None
    with means_for(checkpoint, **means) as (pool, cache):
        if target is not None:
            beside = place.absolute().parent if isinstance(place, Path) else scratch or Path()
            made = search_plan(
                checkpoint, config, settings, search, target, pool, cache, means["device"], rounding, beside
            )
        elif plan_file is None:
            made = build_plan(checkpoint, config, settings, pool, cache, means["device"], quantizer)
        if cache is not None:
            cache.close()  # others may measure while this one writes
        work: Any = (progress, pool, restart, means["hash_contents"])
        rest: Any = {"imatrix": imatrix, "rounding": rounding}
        if isinstance(place, Path):
            result = pipeline.quantize(checkpoint, made, place, *work, **rest)
        else:
            result = pipeline.quantize_to_store(checkpoint, made, place, scratch or Path(), *work, **rest)
    usage = "Uploaded."
    if isinstance(place, Path):
        usage = f"{profile(made.engine).writer.usage.format(out=output)}\n{run_hint(made.engine, output, model)}"
    note(result["notes"])
    left = result["not_calibrated"]
    for name, reason in list(left.items())[:5]:
        err.print(f"note: {name} is rounded without its inputs: {reason}", markup=False, soft_wrap=True)
    if len(left) > 5:
        err.print(f"note: and {len(left) - 5} more; --json names them all", markup=False, soft_wrap=True)
    summary = (
        f"{output}: {human_bytes(result['size_bytes'])} of weights, was {human_bytes(result['source_bytes'])}; "
        f"{result['tensors']} tensors re-read and correct\n{usage}"
    )
    tables = [summary] if made.average_bits is None else [plan_table(made), summary]
    show(as_json, made.model_dump(mode="json", exclude={"table"}) | result, *tables)


@app.command()
@with_options(
    frozenset(
        {
            "bits",
            "bpw",
            "size",
            "engine",
            "method",
            "stats",
            "unweighted",
            "device",
            "imatrix",
            "pre_tokenizer",
            "codec",
        }
    ),
    settings=plan_settings,
    means=means_settings,
)
def compare(
    model: ModelArgument,
    settings: Any,
    means: Any,
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text file to evaluate on; may be repeated.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results; a run there is gone on with.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further text files.")] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Allocators, comma-separated, or all (see `alphaq methods`); also with settings: alphaq:gamma=2."
        ),
    ] = "uniform,random,first-layers,structure,distortion,alphaq,paper,auto",
    quantizers: Annotated[
        str | None,
        typer.Option(help="Quantizers, comma-separated (see `alphaq quantizers`); the usual one by default."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that gptq and learned look at; enough for the experts by default.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Budgets: bits per expert weight, comma-separated.")] = "2,2.5,3,3.5",
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each text to use; all by default.")] = None,
    skip_tokens: Annotated[int, typer.Option(min=0, help="Tokens to leave out at the start of each text.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Allocators side by side at the same bytes: perplexity, KL, EAR, top-1, with paired confidence intervals."""
    from alphaq.sensitivity.methods import METHODS, method

    names = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",") if name.strip()]
    if methods == "all" and settings["calibration"] in (None, *get_args(ProxyKind)):
        names = [name for name in names if not METHODS[name].needs_text]
    for name in names:
        method(name.partition(":")[0])
    try:
        budgets = [float(part) for part in bits.split(",")]
    except ValueError:
        raise BudgetError(f"--bits {bits!r} is no list of numbers. Write for example --bits 2,2.5,3.") from None
    if not names or not budgets:
        raise AlphaQError("Nothing to compare. Give --methods and --bits, for example --bits 2,2.5.")
    fixed = {
        "bits": min(budgets),
        "bpw": None,
        "size": None,
        "engine": "native",
        "stats": None,
        "unweighted": False,
        "imatrix": None,
        "codec": None,
    }
    config = plan_config(settings | fixed | {"method": "distortion"})
    check_dtype(dtype)
    from alphaq.quantizers.base import looks_at_inputs
    from alphaq.trials.compare import compare as run
    from alphaq.trials.tables import comparison_table

    checkpoint = opened(model, means)
    if checkpoint.store is not None:
        raise AlphaQError("compare runs the model, whose weights must lie on a local disk. Download it first.")
    listed = [name.strip() for name in (quantizers or "").split(",") if name.strip()]
    source, calibrated = settings["calibration"], [looks_at_inputs(name) for name in listed]
    roundings = [
        rounding_of(
            checkpoint,
            "native",
            name,
            source if on_text else None,
            calibration_tokens if on_text else None,
            settings["bos"],
        )
        for name, on_text in zip(listed, calibrated, strict=True)
    ]
    on_text = any(method(name.partition(":")[0]).needs_text for name in names)
    if source is not None and not on_text and not any(calibrated):
        raise AlphaQError("--calibration is of no use to these methods and quantizers. Drop it.")
    if calibration_tokens is not None and not any(calibrated):
        raise AlphaQError("--calibration-tokens is of quantizers gptq and learned. Drop it.")
    with means_for(checkpoint, **means) as (pool, cache):
        rows = run(
            checkpoint,
            names,
            budgets,
            [*text, *(more or ())],
            output,
            config,
            text_of(source, settings["bos"]) if on_text else None,
            window,
            max_tokens,
            skip_tokens,
            dtype,
            device,
            progress,
            pool,
            cache,
            roundings,
        )
    for row in rows:
        if row.error:
            err.print(f"note: {row.method} at {row.bits:g} bits: {row.error}", markup=False, soft_wrap=True)
    show(as_json, rows, comparison_table(rows))
    err.print(f"Results in {output}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def engines(as_json: JsonOption = False) -> None:
    """List the engines that a plan can be made for, what shares a choice in each, and the choices."""
    from alphaq.engines.profiles import ENGINES
    from alphaq.report.tables import engines_table

    rows = [
        {
            "engine": one.name,
            "summary": one.summary,
            "unit": one.unit,
            "choices": [str(choice) for choice in one.choices],
            "defaults": [str(choice) for choice in one.defaults],
            "writes": one.export is not None,
        }
        for one in ENGINES.values()
    ]
    show(as_json, rows, engines_table(ENGINES.values()))


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the allocators, what each goes by and what it needs."""
    from alphaq.report.tables import methods_table
    from alphaq.sensitivity.methods import METHODS

    rows = [
        {"method": name, "summary": one.summary, "needs_text": one.needs_text, "kind": one.kind}
        for name, one in METHODS.items()
    ]
    show(as_json, rows, methods_table(METHODS))


@app.command()
def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, or folder that holds plan.json.")],
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Matrices to explain, e.g. 'layers.0.*down_proj'.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Units to show at most.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Why matrices got their bits: loss at each choice, gain per byte against the price, what would move them."""
    from alphaq.report.explanation import explain_plan, explanation_tables

    path = plan_file / "plan.json" if plan_file.is_dir() else plan_file
    if not path.is_file():
        raise AlphaQError(f"No plan file {path}. Make one with `alphaq plan MODEL --bits 2.5 -o {path.name}`.")
    explained = explain_plan(Plan.read(path), pattern, limit)
    show(as_json, explained, *explanation_tables(explained))


@app.command()
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `alphaq quantize` wrote.")],
    source: Annotated[str | None, typer.Option(help="Original checkpoint, to compare values too.")] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Also run a few tokens in the engine, beside the restored weights.")
    ] = False,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Re-read every tensor against the plan, the checksums and (with --source) the original values."""
    from dataclasses import asdict

    from alphaq import pipeline
    from alphaq.report.verified import run_line
    from alphaq.writing.artifact import open_source

    original = None if source is None else open_source(source)
    note(() if original is None else original.notes)
    with means_for(original, workers) as (pool, _):
        result = pipeline.verify(output, original, progress, pool)
    ran = pipeline.verify_run(output, original) if run else None
    beside = ""
    if result["mean_relative_error_expected"] is not None:
        found, expected = (result[f"mean_relative_error_{kind}"] for kind in ("planned", "expected"))
        beside = f"; of planned matrices {found:.4g}, expected {expected:.4g}"
    show(
        as_json,
        {"ok": True, **result, "run": None if ran is None else asdict(ran)},
        f"{output}: all {result['tensors']} tensors are as planned ({result['quantized']} quantized, "
        f"mean relative error {result['mean_relative_error']:.4g}{beside})",
        run_line(ran, original is not None),
    )


@app.command("eval")
def evaluate(
    model: ModelArgument,
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text file; may be repeated.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further text files.")] = None,
    reference: Annotated[str | None, typer.Option(help="Model to compare with: KL, top-1, acceptance rate.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each text to use; all by default.")] = None,
    bos: BosOption = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity per text with its interval; with --reference also KL, top-1 agreement and EAR."""
    check_dtype(dtype)
    from alphaq import pipeline
    from alphaq.report.tables import fidelity_table

    note_folders(model, reference)
    texts = [*text, *(more or ())]
    fidelity = pipeline.evaluate(model, texts, reference, window, max_tokens, device, dtype, progress, bos)
    show(as_json, {"model": model, **pipeline.fidelity_json(fidelity)}, fidelity_table(fidelity))


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt greedily."""
    from alphaq.runtime.loading import generate_text

    note_folders(model)
    completion = generate_text(model, prompt, max_new_tokens, device)
    if as_json:
        show(True, {"model": model, "prompt": prompt, "completion": completion})
    else:
        sys.stdout.write(prompt + completion + "\n")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")] = Path(
        "alphaq-demo"
    ),
    as_json: JsonOption = False,
) -> None:
    """The whole story on the bundled model: plan, quantize, evaluate, report."""
    from alphaq import pipeline
    from alphaq.report.tables import demo_table

    result = pipeline.demo(output, progress)
    show(
        as_json,
        result,
        demo_table(result["rows"]),
        f'Report: {result["report"]}\nModel:  {result["model"]}  (try: alphaq generate {result["model"]} "def main")',
    )


app.command()(recode)
app.command("slice")(slice_)
app.command()(certify)
app.command()(card)
app.command()(report)
app.command()(plot)
app.command()(quantizers)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"alphaq {__version__}\n")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    warnings.filterwarnings("ignore", category=UserWarning)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 a user's mistake or what the system refuses, 130 interrupted, 143 stopped.

    A defect keeps its traceback.
    """
    try:
        signal.signal(signal.SIGTERM, _terminated)
        given = list(sys.argv[1:] if arguments is None else arguments)  # certificates record it
        code = typer.main.get_command(app).main(args=arguments, prog_name="alphaq", standalone_mode=False, obj=given)
        sys.stdout.flush()
    except AlphaQError as error:
        _fail(str(error))
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115, what is left in it would be refused again at the end
        if isinstance(error, BrokenPipeError):  # whoever reads has seen enough
            sys.exit(141)  # as if SIGPIPE had ended it
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}. Check that it is there, its permissions, and the space on the disk.")
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted; what was measured and quantized is kept for the next run", highlight=False)
        sys.exit(130)
    except Exception as error:
        # Typer's usage errors share no public base class across its versions, but all can format themselves.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # bare `alphaq`: the help has been shown
            sys.exit(2)
        _fail(f"{error.format_message()} See `alphaq --help`.")
    sys.exit(code if isinstance(code, int) else 0)


def _terminated(number: int, frame: object) -> None:
    """Unwind on SIGTERM, so that temporary output is removed."""
    sys.exit(128 + number)


def _fail(message: str) -> None:
    err.print("error: " + " ".join(message.split()), markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)
