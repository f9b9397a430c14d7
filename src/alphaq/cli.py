"""The command line: arguments to config to pipeline, and nothing else.

With `--json` exactly one object goes to stdout; progress, tables and errors go to stderr. A user's
mistake ends with one line and exit code 2.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alphaq import __version__
from alphaq.config import Blocks, Budget, Noise, PlanConfig, ProxyKind, Rule, Tail
from alphaq.errors import AlphaQError, BudgetError
from alphaq.records import Plan, first_fault
from alphaq.registry import unknown

if TYPE_CHECKING:
    from alphaq.calibration.text import Text
    from alphaq.checkpoint.imatrix import ImportanceMatrix

T = TypeVar("T")
PIPED_WIDTH, WIDEST = 120, 400
err = Console(stderr=True)
app = typer.Typer(
    name="alphaq",
    help="Fit Mixture-of-Experts models into the memory you have, without calibration data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a safetensors checkpoint, or a GGUF file.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Processes; all cores by default, fewer for a small model. Same result.")
]
BUDGET, CHOICES, SCORES, LIMITS = "Budget (one of)", "Choices", "Scores", "Limits"


def _plan_settings(
    bits: Annotated[
        float | None,
        typer.Option(
            help="Average bits per expert weight: the bytes of a plain mix of that width (group 128 in native).",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    bpw: Annotated[
        float | None,
        typer.Option(help="Stored bits per expert weight, scales and zeros included.", rich_help_panel=BUDGET),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Total size of the weight files, e.g. 9.5MiB, 12GiB.", rich_help_panel=BUDGET),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Engine to plan for; see `alphaq engines`.", rich_help_panel=CHOICES)
    ] = "native",
    choices: Annotated[
        str | None,
        typer.Option(
            help="Candidates: bits, bits and group size, mixes within a matrix, ggml types "
            "(2,3g64,4g128s,2g128-slim,1g128-pb4,Q4_K); all the engine's usual ones by default.",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Columns per scale, for choices that name none: 32, 64 or 128.", rich_help_panel=CHOICES),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Store no zero points.", rich_help_panel=CHOICES)
    ] = False,
    attention_bits: Annotated[
        int | None, typer.Option(help="Bits of attention projections (4; 16 keeps them).", rich_help_panel=CHOICES)
    ] = None,
    shared_bits: Annotated[
        int | None,
        typer.Option(help="Bits of shared experts and dense MLPs (4; 16 keeps them).", rich_help_panel=CHOICES),
    ] = None,
    embedding_bits: Annotated[
        int | None,
        typer.Option(help="Bits of the token embedding (llama.cpp: 4; kept elsewhere).", rich_help_panel=CHOICES),
    ] = None,
    head_bits: Annotated[
        int | None,
        typer.Option(help="Bits of the output matrix (llama.cpp: 6; kept elsewhere).", rich_help_panel=CHOICES),
    ] = None,
    method: Annotated[str, typer.Option(help="Allocator; see `alphaq methods`.", rich_help_panel=SCORES)] = "auto",
    gamma: Annotated[
        str, typer.Option(help="Exponent of (α₀/α)^γ in method alphaq: a number, or auto.", rich_help_panel=SCORES)
    ] = "auto",
    noise: Annotated[
        str | None,
        typer.Option(
            help="analytic (Var·2^-2b) or measured (round trip; the default where weights are given).",
            rich_help_panel=SCORES,
        ),
    ] = None,
    spectrum: Annotated[
        str, typer.Option(help="Eigenvalues of farms (blocks) or of the whole matrix.", rich_help_panel=SCORES)
    ] = "farms",
    tail: Annotated[
        str, typer.Option(help="Where the tail starts: hill, median, finger or ks.", rich_help_panel=SCORES)
    ] = "hill",
    stats: Annotated[
        Path | None,
        typer.Option(help="Scores from a CSV (name, alpha, variance) instead of measuring.", rich_help_panel=SCORES),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|self|norm|identity",
            help="Text for methods and quantizers that look at inputs; self: the model's own writing. For quantizers "
            "also what stands for inputs: the norms' weights, or nothing (identity).",
            rich_help_panel=SCORES,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="llama.cpp's importance matrix, for its quantizers; ones by default.", rich_help_panel=SCORES
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of method random.", rich_help_panel=SCORES)] = 0,
    unweighted: Annotated[
        bool,
        typer.Option(
            "--unweighted", help="Count matrices, not weights, as the paper's code does.", rich_help_panel=SCORES
        ),
    ] = False,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=CHOICE, e.g. 'layers.0.*=8', attention=16. Repeat.", rich_help_panel=LIMITS),
    ] = None,
    min_bits: Annotated[
        list[str] | None,
        typer.Option(help="Least bits, of all or of PATTERN=BITS, e.g. 2, down=3. Repeat.", rich_help_panel=LIMITS),
    ] = None,
    max_bits: Annotated[
        list[str] | None,
        typer.Option(help="Most bits, of all or of PATTERN=BITS. Repeat.", rich_help_panel=LIMITS),
    ] = None,
    min_sqnr: Annotated[
        str | None,
        typer.Option(help="Least signal-to-noise ratio of a matrix, e.g. 9dB.", rich_help_panel=LIMITS),
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="One budget for each layer.", rich_help_panel=LIMITS)
    ] = False,
) -> None:
    """Everything that decides a plan apart from the checkpoint; commands that plan share it."""


def _means_settings(
    revision: RevisionOption = None,
    workers: WorkersOption = None,
    device: Annotated[str, typer.Option(help="Where eigenvalues are computed: cpu, cuda, cuda:1.")] = "cpu",
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure anew and keep nothing for the next run.")
    ] = False,
    hash_contents: Annotated[
        bool,
        typer.Option("--hash-contents", help="Recognise weights by their contents, not by when they were written."),
    ] = False,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name of the tokenizer's splitting rule, where it is not recognised."),
    ] = None,
) -> None:
    """How the work is done, which changes no result; commands that read weights share it."""


def with_options(
    leaving_out: frozenset[str] = frozenset(), **groups: Callable[..., None]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add groups of options to a command: it takes each group as one dictionary under the group's name."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = signature(command, eval_str=True).parameters
        shared = {
            group: {
                name: parameter
                for name, parameter in signature(options, eval_str=True).parameters.items()
                if name not in leaving_out
            }
            for group, options in groups.items()
        }

        @wraps(command)
        def run(**given: Any) -> None:
            collected = {group: {name: given.pop(name) for name in names} for group, names in shared.items()}
            command(**given, **collected)

        every = [parameter for name, parameter in own.items() if name not in groups]
        every += [parameter for names in shared.values() for parameter in names.values()]
        parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in every]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def progress(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """Yield the items under a bar with rate and time left, on stderr; plainly where that is no terminal."""
    if not err.is_terminal:
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")
        for item in items:
            yield item
            bar.advance(task)
            speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
            bar.update(task, rate=f"{speed:.1f}/s" if speed else "")


def show(as_json: bool, data: Any, *tables: Any) -> None:
    """Print JSON on stdout, or tables."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    else:
        console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        for table in tables:
            if not sys.stdout.isatty():  # nothing is cut off in a file
                console.width = WIDEST
                console.width = max(PIPED_WIDTH, console.measure(table).maximum)
            console.print(table, markup=False, highlight=False, soft_wrap=isinstance(table, str))


def plan_config(settings: Mapping[str, Any], with_model: bool = True) -> PlanConfig:
    """Check everything a plan is asked for before any work. Raises AlphaQError."""
    from alphaq.planning import resolve

    given = dict(settings)
    for name, known in (("noise", get_args(Noise)), ("spectrum", get_args(Blocks)), ("tail", get_args(Tail))):
        if given[name] is not None and given[name] not in known:
            raise AlphaQError(unknown(f"--{name}", given[name], known))
    budget = Budget.of(given.pop("bits"), given.pop("bpw"), given.pop("size"))
    stats, calibration = given.pop("stats"), given.pop("calibration")
    importance = _importance(given.pop("imatrix"))
    if stats is not None and (given["spectrum"], given["tail"]) != ("farms", "hill"):
        raise AlphaQError("--stats already holds α, so --spectrum and --tail decide nothing. Drop one or the other.")
    sqnr = given.pop("min_sqnr")
    try:
        config = PlanConfig(
            budget=budget,
            gamma=_gamma(given.pop("gamma")),  # type: ignore[arg-type]
            pins=tuple(Rule.parse(text, "--pin") for text in given.pop("pin") or ()),
            min_bits=tuple(Rule.parse(text, "--min-bits", "*") for text in given.pop("min_bits") or ()),
            max_bits=tuple(Rule.parse(text, "--max-bits", "*") for text in given.pop("max_bits") or ()),
            min_sqnr_db=None if sqnr is None else _decibels(sqnr),
            imatrix=None if importance is None else f"{importance.name} {importance.digest}",
            **given,
        )
    except ValidationError as error:
        raise BudgetError(f"{first_fault(error)}. See `alphaq plan --help`.") from None
    text = _text(calibration) if resolve(config, with_model).method.needs_text else None
    return config if text is None else config.model_copy(update={"calibration": text.name})


def _text(source: str | None) -> Text | None:
    """What methods are to look at. Raises AlphaQError if it is no text."""
    found = _inputs(source)
    if source in get_args(ProxyKind):
        raise AlphaQError(f"--calibration {source} stands for inputs of quantizers alone. Give a text, or self.")
    return found


def _inputs(source: str | None) -> Any:
    """What quantizers are to look at, a Text or a Proxy. Raises AlphaQError if it is neither."""
    if source is None:
        return None
    from alphaq.calibration.proxy import Proxy
    from alphaq.calibration.text import SELF, Text

    if source == SELF:
        return Text(SELF)
    if source in get_args(ProxyKind):
        return Proxy(source)  # type: ignore[arg-type]
    if not Path(source).is_file():
        raise AlphaQError(f"No text file {source}. Give a UTF-8 text with --calibration, or --calibration self.")
    return Text(Path(source))


def _rounding(checkpoint: Any, engine: str, quantizer: str | None, source: str | None, tokens: int | None) -> Any:
    """How matrices are to be rounded. Raises AlphaQError for options that fit no quantizer."""
    from dataclasses import replace

    from alphaq.calibrated import Rounding, enough_tokens
    from alphaq.calibration.text import Text

    rounding = Rounding.of(engine, quantizer, _inputs(source))
    if not isinstance(rounding.text, Text):
        if tokens is not None:
            raise AlphaQError("--calibration-tokens is of quantizers gptq and learned, and of texts. Drop it.")
        return rounding
    return replace(rounding, text=replace(rounding.text, tokens=tokens or enough_tokens(checkpoint)))


def _importance(path: Path | None) -> ImportanceMatrix | None:
    from alphaq.checkpoint.imatrix import read_imatrix

    return None if path is None else read_imatrix(path)


def _gamma(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise BudgetError(f"--gamma {text!r} is neither a number nor auto. Try --gamma auto.") from None


def _decibels(text: str) -> float:
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,6})?)\s*(?:dB)?\s*", text, re.IGNORECASE)
    if match is None:
        raise BudgetError(f"--min-sqnr {text!r} is no ratio in decibels. Write for example 9dB.")
    return float(match[1])


def cache_folder() -> Path:
    """$ALPHAQ_CACHE, or alphaq in the user's cache folder."""
    if own := os.environ.get("ALPHAQ_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphaq"


def _open(model: str, means: Mapping[str, Any]) -> Any:
    """The checkpoint that a command is to work on."""
    from dataclasses import replace

    from alphaq.checkpoint.reader import open_checkpoint

    return replace(open_checkpoint(model, means["revision"]), pre_tokenizer=means.get("pre_tokenizer"))


@contextmanager
def _means(
    checkpoint: Any,
    workers: int | None,
    no_cache: bool = True,
    hash_contents: bool = False,
    device: str = "cpu",
    **opening: Any,
) -> Iterator[tuple[Any, Any]]:
    """The processes to work with, and what earlier runs have measured of the checkpoint."""
    from alphaq.cache import Cache
    from alphaq.spectra.device import check_device
    from alphaq.workers import Workers, sensible_count

    if device != "cpu":
        check_device(device)
    nbytes = 0 if checkpoint is None else checkpoint.nbytes
    with ExitStack() as stack:
        cache = None
        if checkpoint is not None and not no_cache:
            identity = {
                "fingerprint": checkpoint.fingerprint,
                "contents": checkpoint.contents(hash_contents),
                "device": device.partition(":")[0],
            }
            cache = stack.enter_context(Cache(cache_folder(), identity))
        yield stack.enter_context(Workers(workers or sensible_count(nbytes), checkpoint)), cache


def _build_plan(
    checkpoint: Any,
    config: PlanConfig,
    settings: Mapping[str, Any],
    workers: Any,
    cache: Any,
    device: str,
    quantizer: str | None = None,
) -> Plan:
    from alphaq import planning

    request = planning.resolve(config, checkpoint is not None)
    if config.gamma != "auto" and request.config.method not in ("alphaq", "paper"):
        raise BudgetError(f"--gamma is of methods alphaq and paper; {request.config.method} does not use it. Drop it.")
    text = _text(settings["calibration"]) if request.method.needs_text else None
    if settings["calibration"] is not None and text is None and quantizer is None:
        raise BudgetError(f"--calibration is of no use to method {request.config.method}. Drop it.")
    found = planning.measure_for_plan(
        checkpoint,
        request,
        settings["stats"],
        progress,
        workers,
        cache,
        device,
        text,
        imatrix=_importance(settings["imatrix"]),
    )
    plan = planning.make_plan(checkpoint, request, found)
    missed = {name: reason for name, reason in plan.unplanned.items() if "not an expert" not in reason}
    for name, reason in [*missed.items(), *plan.neutral.items()][:5]:
        err.print(f"note: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if plan.lower_bound is not None and plan.gap > 1e-6:
        err.print(f"note: this plan is proven to be within {plan.gap:.2g} (relative) of the best one", highlight=False)
    widest = max(request.offered).bits
    if config.budget.bits is not None and config.budget.bits > widest:
        err.print(f"note: no choice offered is wider than {widest} bits, so the budget is not used up", highlight=False)
    return plan


def _check_dtype(dtype: str) -> None:
    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise AlphaQError(unknown("--dtype", dtype, known))


def _given(context: typer.Context) -> set[str]:
    """Names of the parameters that were typed, not left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


@app.command()
def inspect(model: ModelArgument, revision: RevisionOption = None, as_json: JsonOption = False) -> None:
    """Show a checkpoint's architecture, roles, counts and sizes; reads headers only."""
    from alphaq.checkpoint.reader import open_checkpoint, summarize
    from alphaq.report.tables import inspect_table

    summary = summarize(open_checkpoint(model, revision))
    show(as_json, summary, inspect_table(summary))


@app.command()
@with_options(means=_means_settings)
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
    from alphaq.spectra.variants import SpectrumVariant

    variant = SpectrumVariant(spectrum, tail)  # type: ignore[arg-type]
    check_file(output)
    checkpoint = _open(model, means)
    with _means(checkpoint, **means) as (pool, cache):
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
    show(as_json, summary, f"{len(rows)} matrices measured into {output}: {spread}")


@app.command()
@with_options(settings=_plan_settings, means=_means_settings)
def plan(
    settings: Any,
    means: Any,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plan file to write.")] = None,
    write_type_file: Annotated[
        Path | None,
        typer.Option(help="Also write the types for `llama-quantize --tensor-type-file` (engine llama.cpp)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose bits for every expert matrix under a budget; shows the plan, and writes it with -o."""
    config = plan_config(settings, model is not None)
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.engines import llama_cpp
    from alphaq.report.tables import plan_table

    for file in (output, write_type_file):
        if file is not None:
            check_file(file)
    if write_type_file is not None and (model is None or config.engine != llama_cpp.PROFILE.name):
        raise AlphaQError("--write-type-file is for llama.cpp and needs the model. Add MODEL and --engine llama.cpp.")
    checkpoint = None if model is None else _open(model, means)
    with _means(checkpoint, **means) as (pool, cache):
        made = _build_plan(checkpoint, config, settings, pool, cache, means["device"])
    if write_type_file is not None:
        with atomic_file(write_type_file) as partial:
            assert checkpoint is not None  # MODEL is given
            partial.write_text(llama_cpp.type_file(checkpoint, made.every_choice()), encoding="utf-8")
        err.print(f"Types written to {write_type_file}", markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        with atomic_file(output) as partial:
            partial.write_text(made.to_json(), encoding="utf-8")
        err.print(f"Plan written to {output}", markup=False, highlight=False, soft_wrap=True)
    show(as_json, made.model_dump(mode="json", exclude={"table"}), plan_table(made))


@app.command()
@with_options(settings=_plan_settings, means=_means_settings)
def quantize(
    context: typer.Context,
    model: ModelArgument,
    settings: Any,
    means: Any,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Use this plan instead of making one.")] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(help="rtn, clipped, hqq, gptq, learned, minmax (docs/quantizers.md); the engine's usual one."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that gptq and learned look at; enough for the experts by default.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan and quantize a checkpoint, then re-read the result against the source."""
    from alphaq.checkpoint.writer import check_absent
    from alphaq.engines.profiles import profile
    from alphaq.report.tables import human_bytes, plan_table

    check_absent(output)
    if plan_file is not None:
        if conflicting := _given(context) & {*settings, "no_cache", "device"} - {"imatrix", "calibration"}:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(conflicting))
            raise BudgetError(f"--plan already decides everything that {names} would. Drop one or the other.")
        if not plan_file.is_file():
            raise BudgetError(
                f"No plan file {plan_file}. Make one with `alphaq plan MODEL --bits 2.5 -o {plan_file.name}`."
            )
        made = Plan.read(plan_file)
    else:
        config = plan_config(settings)
    from alphaq import pipeline
    from alphaq.calibrated import CALIBRATED

    checkpoint = _open(model, means)
    engine = made.engine if plan_file is not None else config.engine
    pipeline.check_source(checkpoint, engine)
    planned_on_text = plan_file is None and config.calibration is not None
    source = None if planned_on_text and quantizer not in CALIBRATED else settings["calibration"]
    rounding = _rounding(checkpoint, engine, quantizer, source, calibration_tokens)
    means["no_cache"] |= plan_file is not None
    with _means(checkpoint, **means) as (pool, cache):
        if plan_file is None:
            made = _build_plan(checkpoint, config, settings, pool, cache, means["device"], quantizer)
        if cache is not None:
            cache.close()  # others may measure while this one writes
        result = pipeline.quantize(
            checkpoint,
            made,
            output,
            progress,
            pool,
            restart,
            means["hash_contents"],
            imatrix=_importance(settings["imatrix"]),
            rounding=rounding,
        )
    left = result["not_calibrated"]
    for name, reason in list(left.items())[:5]:
        err.print(f"note: {name} is rounded without its inputs: {reason}", markup=False, soft_wrap=True)
    if len(left) > 5:
        err.print(f"note: and {len(left) - 5} more; --json names them all", markup=False, soft_wrap=True)
    summary = (
        f"{output}: {human_bytes(result['size_bytes'])} of weights, was {human_bytes(result['source_bytes'])}; "
        f"{result['tensors']} tensors re-read and correct\n{profile(made.engine).writer.usage.format(out=output)}"
    )
    tables = [summary] if made.average_bits is None else [plan_table(made), summary]
    show(as_json, made.model_dump(mode="json", exclude={"table"}) | result, *tables)


@app.command()
@with_options(
    frozenset({"bits", "bpw", "size", "engine", "method", "stats", "unweighted", "device", "imatrix", "pre_tokenizer"}),
    settings=_plan_settings,
    means=_means_settings,
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
        typer.Option(help="Quantizers, comma-separated: rtn,hqq,gptq,learned,minmax. The usual one."),
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
    from dataclasses import asdict

    from alphaq.sensitivity.methods import METHODS, method

    names = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",") if name.strip()]
    if settings["calibration"] is None and methods == "all":
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
    }
    config = plan_config(settings | fixed | {"method": "distortion"})
    _check_dtype(dtype)
    from alphaq.calibrated import CALIBRATED
    from alphaq.comparison import compare as run
    from alphaq.report.tables import comparison_table

    checkpoint = _open(model, means)
    listed = [name.strip() for name in (quantizers or "").split(",") if name.strip()]
    source, calibrated = settings["calibration"], [name in CALIBRATED for name in listed]
    roundings = [
        _rounding(checkpoint, "native", name, source if on_text else None, calibration_tokens if on_text else None)
        for name, on_text in zip(listed, calibrated, strict=True)
    ]
    on_text = any(method(name.partition(":")[0]).needs_text for name in names)
    if source is not None and not on_text and not any(calibrated):
        raise AlphaQError("--calibration is of no use to these methods and quantizers. Drop it.")
    if calibration_tokens is not None and not any(calibrated):
        raise AlphaQError("--calibration-tokens is of quantizers gptq and learned. Drop it.")
    with _means(checkpoint, **means) as (pool, cache):
        rows = run(
            checkpoint,
            names,
            budgets,
            [*text, *(more or ())],
            output,
            config,
            _text(source) if on_text else None,
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
    found = [asdict(row) for row in rows]
    for row in found:
        if row["error"]:
            err.print(f"note: {row['method']} at {row['bits']:g} bits: {row['error']}", markup=False, soft_wrap=True)
    show(as_json, found, comparison_table(found))
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
    show(as_json, rows, engines_table(rows))


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the allocators, what each goes by and what it needs."""
    from alphaq.report.tables import methods_table
    from alphaq.sensitivity.methods import METHODS

    rows = [
        {"method": name, "summary": one.summary, "needs_text": one.needs_text, "kind": one.kind}
        for name, one in METHODS.items()
    ]
    show(as_json, rows, methods_table(rows))


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
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Re-read every tensor against the plan, the checksums and (with --source) the original values."""
    from alphaq import pipeline
    from alphaq.checkpoint.reader import open_checkpoint

    original = None if source is None else open_checkpoint(source)
    with _means(original, workers) as (pool, _):
        result = pipeline.verify(output, original, progress, pool)
    beside = ""
    if result["mean_relative_error_expected"] is not None:
        found, expected = (result[f"mean_relative_error_{kind}"] for kind in ("planned", "expected"))
        beside = f"; of planned matrices {found:.4g}, expected {expected:.4g}"
    show(
        as_json,
        {"ok": True, **result},
        f"{output}: all {result['tensors']} tensors are as planned ({result['quantized']} quantized, "
        f"mean relative error {result['mean_relative_error']:.4g}{beside})",
    )


@app.command("eval")
def evaluate(
    model: ModelArgument,
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text file; may be repeated.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further text files.")] = None,
    reference: Annotated[str | None, typer.Option(help="Model to compare with: KL, top-1, acceptance rate.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each text to use; all by default.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity per text with its interval; with --reference also KL, top-1 agreement and EAR."""
    _check_dtype(dtype)
    from alphaq import pipeline
    from alphaq.report.tables import fidelity_table

    fidelity = pipeline.evaluate(model, [*text, *(more or ())], reference, window, max_tokens, device, dtype, progress)
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
        code = typer.main.get_command(app).main(args=arguments, prog_name="alphaq", standalone_mode=False)
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
