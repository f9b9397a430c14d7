"""Options that commands share, and what becomes of them before any work: configs, texts, checkpoints, plans."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import ValidationError

from alphaq.errors import AlphaQError, BudgetError
from alphaq.nouns.choice import CODECS
from alphaq.nouns.plan import Plan, first_fault
from alphaq.nouns.settings import Blocks, Budget, Noise, PlanConfig, ProxyKind, Rule, Tail, option_of
from alphaq.registry import unknown
from alphaq.terminal import err, progress, show

if TYPE_CHECKING:
    from alphaq.calibration.proxy import Proxy
    from alphaq.calibration.text import Text
    from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.planning import Measurements, Request
    from alphaq.trials.search import Target
    from alphaq.writing.calibrated import Rounding

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a safetensors checkpoint, or a GGUF file.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Processes; all cores by default, fewer for a small model. Same result.")
]
BosOption = Annotated[
    bool,
    typer.Option("--bos/--no-bos", help="Begin each window with what the model's tokenizer puts before a text."),
]
TextsOption = Annotated[list[Path], typer.Option("--text", help="UTF-8 text file; may be repeated.")]
MoreTextsArgument = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further text files.")]
BUDGET, CHOICES, SCORES, LIMITS = "Budget (one of)", "Choices", "Scores", "Limits"
SEARCH = "Search (with --ear)"
ANY_BUDGET = 32.0  # bits per weight; stands for the budget that a search will find


def plan_settings(
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
        int | None,
        typer.Option(help="Bits of attention and other mixers of tokens (4; 16 keeps them).", rich_help_panel=CHOICES),
    ] = None,
    shared_bits: Annotated[
        int | None,
        typer.Option(help="Bits of shared experts and dense MLPs (4; 16 keeps them).", rich_help_panel=CHOICES),
    ] = None,
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of the token embedding (llama.cpp: 4; native keeps it unless asked; others keep it).",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    head_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of the output matrix (llama.cpp: 6; native keeps it unless asked; others keep it).",
            rich_help_panel=CHOICES,
        ),
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
    codec: Annotated[
        str | None,
        typer.Option(help="Entropy-code the files: zstd. Budgets count coded bytes.", rich_help_panel=CHOICES),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of method random.", rich_help_panel=SCORES)] = 0,
    bos: BosOption = True,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Hold the default method's plan against uniform bits on the model's own writing, and take the better.",
            rich_help_panel=SCORES,
        ),
    ] = True,
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


def search_settings(
    ear: Annotated[
        float | None,
        typer.Option(
            help="Instead of a budget: the smallest plan whose expected acceptance rate, measured on --text, reaches "
            "this (0.99: distribution-lossless). Engine native.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="UTF-8 text file; may be repeated.", rich_help_panel=SEARCH)
    ] = None,
    more: MoreTextsArgument = None,
    reaches: Annotated[
        str,
        typer.Option(
            help="When it is reached: the 95 % interval holds or exceeds it (within), the estimate does (estimate), or "
            "the whole interval (above).",
            rich_help_panel=SEARCH,
        ),
    ] = "within",
    ear_step: Annotated[
        float, typer.Option(help="Budgets differ by this, in stored bits per expert weight.", rich_help_panel=SEARCH)
    ] = 0.0625,
    curve: Annotated[
        Path | None, typer.Option(help="JSON file for every budget that was tried.", rich_help_panel=SEARCH)
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.", rich_help_panel=SEARCH)] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of each text to use; all by default.", rich_help_panel=SEARCH)
    ] = None,
    skip_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to leave out at the start of each text.", rich_help_panel=SEARCH)
    ] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=SEARCH)] = "float32",
) -> None:
    """How the smallest plan that keeps an expected acceptance rate is searched; commands that plan share it."""


def means_settings(
    revision: RevisionOption = None,
    workers: WorkersOption = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ray[:HOST:PORT]",
            help="Work on the nodes of a running Ray cluster; --workers is the most cores then. Same result.",
        ),
    ] = None,
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


def plan_config(settings: Mapping[str, Any], with_model: bool = True) -> PlanConfig:
    """Check everything a plan is asked for before any work. Raises AlphaQError."""
    from alphaq.planning import resolve

    config = _parsed(settings)
    if settings["stats"] is not None and (config.spectrum, config.tail) != ("farms", "hill"):
        raise AlphaQError("--stats already holds α, so --spectrum and --tail decide nothing. Drop one or the other.")
    text = text_of(settings["calibration"]) if resolve(config, with_model).method.needs_text else None
    return config if text is None else config.model_copy(update={"calibration": text.name})


def _parsed(settings: Mapping[str, Any]) -> PlanConfig:
    """The options' values, each checked by itself; the text is left out."""
    given = dict(settings)
    for name, known in (("noise", get_args(Noise)), ("spectrum", get_args(Blocks)), ("tail", get_args(Tail))):
        if given[name] is not None and given[name] not in known:
            raise AlphaQError(unknown(f"--{name}", given[name], known))
    given["budget"] = Budget.of(given.pop("bits"), given.pop("bpw"), given.pop("size"))
    importance, stats, sqnr = importance_matrix(given.pop("imatrix")), given.pop("stats"), given.pop("min_sqnr")
    given["gamma"] = _gamma(given["gamma"])
    given["pins"] = tuple(Rule.parse(text, "--pin") for text in given.pop("pin") or ())
    for name in ("min_bits", "max_bits"):
        given[name] = tuple(Rule.parse(text, f"--{name.replace('_', '-')}", "*") for text in given[name] or ())
    given["min_sqnr_db"] = None if sqnr is None else _decibels(sqnr)
    given["imatrix"] = None if importance is None else f"{importance.name} {importance.digest}"
    given["stats"] = getattr(stats, "name", None)  # numbers that come from an output have none
    given["calibration"] = None
    try:
        return PlanConfig(**given)
    except ValidationError as error:
        raise BudgetError(f"{first_fault(error)}. See `alphaq plan --help`.") from None


def read_plan(path: Path, settings: Mapping[str, Any], given: set[str]) -> Plan:
    """A plan file, unless an option that was typed (`given`) would decide what the plan has decided otherwise.

    Raises BudgetError naming the options, or PlanError.
    """
    given = given - {"imatrix", "calibration"}  # a plan only names them
    conflicting, plan = given - settings.keys(), None
    if not conflicting:
        if not path.is_file():
            raise BudgetError(f"No plan file {path}. Make one with `alphaq plan MODEL --bits 2.5 -o {path.name}`.")
        plan = Plan.read(path)
        conflicting = given - said_by(plan, settings, given)
    if plan is None or conflicting:
        whose = f" (it is for {plan.engine})" if plan is not None and "engine" in conflicting else ""
        raise BudgetError(
            f"--plan already decides everything that {option_names(conflicting)} would{whose}. Drop one or the other."
        )
    return plan


def said_by(plan: Plan, settings: Mapping[str, Any], given: set[str]) -> set[str]:
    """Which of the options that were typed say the same as a plan."""
    same = {"engine"} & given if settings["engine"] == plan.engine else set()
    try:
        config = PlanConfig.model_validate(plan.config)
    except ValidationError:  # written by hand, or by another tool
        return same
    budget = ("bits", "bpw", "size")
    if not given & {*budget}:
        settings = {**settings, "bits": 1.0}
    asked = _parsed({**settings, "imatrix": None, "stats": None})
    options = {option_of(name): name for name in PlanConfig.model_fields} | dict.fromkeys(
        map(option_of, budget), "budget"
    )
    for name in given & settings.keys() - {"imatrix", "stats", "calibration", "engine"}:
        field = options[option_of(name)]
        if getattr(asked, field) == getattr(config, field):
            same.add(name)
    return same


def text_of(source: str | None, bos: bool = True) -> Text | None:
    """What methods are to look at. Raises AlphaQError if it is no text."""
    if source is None:
        return None
    from alphaq.calibration.text import SELF, Text

    if source in get_args(ProxyKind):
        raise AlphaQError(f"--calibration {source} stands for inputs of quantizers alone. Give a text, or self.")
    if source == SELF:
        return Text(SELF, bos=bos)
    if not Path(source).is_file():
        raise AlphaQError(f"No text file {source}. Give a UTF-8 text with --calibration, or --calibration self.")
    return Text(Path(source), bos=bos)


def _inputs_of(source: str | None) -> Text | Proxy | None:
    """What quantizers are to look at. Raises AlphaQError if it is neither a text nor what stands for one."""
    kinds: tuple[Any, ...] = get_args(ProxyKind)
    if source not in kinds:
        return text_of(source)
    from alphaq.calibration.proxy import Proxy

    return Proxy(kinds[kinds.index(source)])


def rounding_of(
    checkpoint: Checkpoint,
    engine: str,
    quantizer: str | None,
    source: str | None,
    tokens: int | None,
    bos: bool = True,
) -> Rounding:
    """How matrices are to be rounded. Raises AlphaQError for options that fit no quantizer."""
    from dataclasses import replace

    from alphaq.calibration.text import Text
    from alphaq.writing.calibrated import Rounding, enough_tokens

    rounding = Rounding.of(engine, quantizer, _inputs_of(source))
    if not isinstance(rounding.inputs, Text):
        if tokens is not None:
            raise AlphaQError("--calibration-tokens is of quantizers gptq and learned, and of texts. Drop it.")
        return rounding
    inputs = replace(rounding.inputs, tokens=tokens or enough_tokens(checkpoint), bos=bos)
    return replace(rounding, inputs=inputs)


def importance_matrix(path: Path | None) -> ImportanceMatrix | None:
    from alphaq.checkpoint.gguf.imatrix import read_imatrix

    return None if path is None else read_imatrix(path)


def note_source(checkpoint: Checkpoint, engine: str, given: ImportanceMatrix | None) -> None:
    """What the engine's files cannot hold of a checkpoint, and what an importance matrix leaves open, on stderr."""
    from alphaq.engines.profiles import profile

    notes = [*profile(engine).writer.notes(checkpoint)]
    if given is not None:
        notes.append(profile(engine).importance_of(checkpoint, given).note(given.name) or "")
    for note in filter(None, notes):
        err.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


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


def output_target(output: str, scratch: Path | None) -> Any:
    """Where an output goes: a Path, or a Store for an address. Raises AlphaQError."""
    from alphaq.checkpoint.remote import Store, is_url, local_path

    path = local_path(output) if is_url(output) else Path(output)
    if path is None:
        if scratch is not None and not scratch.is_dir():
            raise AlphaQError(f"--scratch {scratch} is no folder. Create it first.")
        return Store.of(output)
    if scratch is not None:
        raise AlphaQError("--scratch is for outputs that are uploaded. Drop it, or give -o an address such as s3://...")
    return path


def opened(model: str, means: Mapping[str, Any], headers_only: bool = False) -> Any:
    """The checkpoint that a command is to work on."""
    from dataclasses import replace

    from alphaq.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(model, means["revision"], headers_only=headers_only)
    note(checkpoint.notes)
    return replace(checkpoint, pre_tokenizer=means.get("pre_tokenizer"))


def show_outline(checkpoint: Any, config: PlanConfig, as_json: bool) -> None:
    """Print what shapes alone say of a plan."""
    from dataclasses import asdict

    from alphaq import planning
    from alphaq.planning.outline import outline
    from alphaq.report.tables import outline_table

    found = outline(checkpoint, planning.resolve(config))
    show(as_json, asdict(found), outline_table(found))


def note(lines: Iterable[str]) -> None:
    """Tell what a user should know, on stderr."""
    for line in lines:
        err.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


def note_folders(*models: str | Path | None) -> None:
    """Tell what lies in models' folders and is not read, where transformers will load them."""
    from alphaq.checkpoint.weights import weight_files

    for model in models:
        folder = None if model is None else Path(model).expanduser()
        if folder is not None and (folder / "config.json").is_file():
            note(f"{model}: {line}" for line in weight_files(folder).notes())


@contextmanager
def means_for(
    checkpoint: Any,
    workers: int | None,
    no_cache: bool = True,
    hash_contents: bool = False,
    device: str = "cpu",
    cluster: str | None = None,
    **opening: Any,
) -> Iterator[tuple[Any, Any]]:
    """The processes to work with, and what earlier runs have measured of the checkpoint."""
    from alphaq.measuring.cache import Cache
    from alphaq.spectra.device import check_device
    from alphaq.work.cluster import RayWorkers, parse_cluster
    from alphaq.work.workers import Workers, sensible_count

    address = None if cluster is None else parse_cluster(cluster)
    if device != "cpu" and address is None:
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
        if address is None:
            pool = Workers(workers or sensible_count(nbytes), checkpoint)
        else:
            pool = RayWorkers(address, checkpoint, workers)
        stack.enter_context(pool)
        if device != "cpu" and isinstance(pool, RayWorkers):
            pool.require_card(device)
        yield pool, cache


def search_target(
    search: Mapping[str, Any], settings: Mapping[str, Any], given: set[str], device: str | None
) -> Target | None:
    """What --ear asks for, None without it. given: names of the options that were typed.

    Raises AlphaQError for a second budget, a missing text, and options of the search without --ear.
    """
    if search["ear"] is None:
        if stray := given & search.keys():
            raise BudgetError(f"{option_names(stray)} is for a search. Add --ear 0.99, or drop it.")
        return None
    for name in ("bits", "bpw", "size"):
        if settings[name] is not None:
            raise BudgetError(f"--ear searches the budget that --{name} states. Give one of them.")
    if not search["text"]:
        raise BudgetError(
            "--ear is measured on texts. Give some that are like what the model is for, with --text FILE."
        )
    if not 0 < search["ear"] <= 1:
        raise BudgetError(f"--ear {search['ear']:g} is not between 0 and 1. Try --ear 0.99.")
    if not 1e-3 <= search["ear_step"] <= 8:
        raise BudgetError(f"--ear-step {search['ear_step']:g} is not between 0.001 and 8 bits. Try --ear-step 0.0625.")
    check_dtype(search["dtype"])
    from alphaq.engines.profiles import profile
    from alphaq.trials.search import REACHES, Target, require_searchable

    if search["reaches"] not in REACHES:
        raise BudgetError(unknown("--reaches", search["reaches"], REACHES))
    require_searchable(profile(settings["engine"]))
    if settings["codec"] not in (None, CODECS[0]):
        raise BudgetError(
            "--ear searches plans of fixed-length files. Drop --codec, and code what comes of it with `alphaq recode`."
        )
    if settings["unweighted"]:
        raise BudgetError("--unweighted counts matrices, and --ear searches bytes. Drop one or the other.")
    return Target(
        ear=search["ear"],
        reaches=search["reaches"],
        step=search["ear_step"],
        device=device,
        bos=settings["bos"],
        **{name: search[name] for name in ("window", "max_tokens", "skip_tokens", "dtype")},
    )


def search_plan(
    checkpoint: Checkpoint,
    config: PlanConfig,
    settings: Mapping[str, Any],
    search: Mapping[str, Any],
    target: Target,
    workers: Any,
    cache: Any,
    device: str,
    rounding: Rounding | None = None,
    scratch: Path | None = None,
) -> Plan:
    """The smallest plan that reaches the target; says what every budget gave on stderr."""
    from alphaq import pipeline
    from alphaq.trials import search as searching

    pipeline.check_source(checkpoint, config.engine)
    if checkpoint.store is not None:
        raise BudgetError(
            f"--ear runs the model, and {checkpoint.store.url} is not on this machine. Download it first."
        )
    request, found = measurements(
        checkpoint, config, settings, workers, cache, device, rounding.calibrated if rounding else None
    )
    if cache is not None:
        cache.close()  # others may measure while this one evaluates

    def told(point: Any) -> None:
        err.print(
            f"{point.budget_bpw:g} bits per weight, {point.size_bytes:,} bytes: EAR {point.ear}"
            f"{'' if point.reached else ', too low'}",
            highlight=False,
            soft_wrap=True,
        )

    plan, curve = searching.search(
        checkpoint,
        request,
        found,
        [*search["text"], *(search["more"] or ())],
        target,
        rounding,
        search["curve"],
        scratch,
        progress,
        workers,
        told,
    )
    chosen, failed = curve.chosen, curve.failed
    assert chosen is not None  # search has raised otherwise
    below = "no smaller budget is feasible" if failed is None else f"the next smaller step has {failed.ear}"
    ear = chosen.ear
    verdict = {"yes": "lies above", "undecided": "contains", "no": "lies below"}[ear.verdict(target.ear)]
    widths = f"--attention-bits {chosen.attention_bits} --shared-bits {chosen.shared_bits}"
    err.print(
        f"smallest: --bpw {chosen.budget_bpw:g} {widths}, EAR {ear}, whose interval {verdict} {target.ear:g}; {below}",
        highlight=False,
        soft_wrap=True,
    )
    _note_plan(plan)
    return plan


def build_plan(
    checkpoint: Any,
    config: PlanConfig,
    settings: Mapping[str, Any],
    workers: Any,
    cache: Any,
    device: str,
    quantizer: str | None = None,
) -> Plan:
    from alphaq import planning
    from alphaq.work.resources import Resources

    request, found = measurements(checkpoint, config, settings, workers, cache, device, quantizer)
    plan = planning.checked_plan(checkpoint, request, found, Resources(cache=cache, wrap=progress))
    _note_plan(plan)
    widest = max(request.offered).bits
    if config.budget.bits is not None and config.budget.bits > widest:
        err.print(f"note: no choice offered is wider than {widest} bits, so the budget is not used up", highlight=False)
    return plan


def measurements(
    checkpoint: Any,
    config: PlanConfig,
    settings: Mapping[str, Any],
    workers: Any,
    cache: Any,
    device: str,
    quantizer: str | None = None,
) -> tuple[Request, Measurements]:
    """The config made concrete, and what must be known for its plans. Raises AlphaQError for options of no use."""
    from alphaq import planning
    from alphaq.work.resources import Resources

    request = planning.resolve(config, checkpoint is not None)
    if config.gamma != "auto" and request.config.method not in ("alphaq", "paper"):
        raise BudgetError(f"--gamma is of methods alphaq and paper; {request.config.method} does not use it. Drop it.")
    text = text_of(settings["calibration"], config.bos) if request.method.needs_text else None
    if settings["calibration"] is not None and text is None and quantizer is None:
        raise BudgetError(f"--calibration is of no use to method {request.config.method}. Drop it.")
    imatrix = importance_matrix(settings["imatrix"])
    if checkpoint is not None:
        note_source(checkpoint, config.engine, imatrix)
    if config.bos and checkpoint is not None and "synthetic" in request.method.needs:
        from alphaq.calibration.tokens import tokenizer_fault

        if fault := tokenizer_fault(checkpoint):
            note([f"the model's tokenizer cannot be loaded ({fault}), so passes begin without BOS"])
    found = planning.measure_for_plan(
        checkpoint,
        request,
        planning.PlanInputs(settings["stats"], text, imatrix),
        Resources(workers, cache, progress, device),
    )
    if zeros := found.zeros:
        err.print(
            f"warning: {len(zeros):,} of {len(found.evidence.names):,} planned matrices hold nothing but zeros, "
            f"{zeros[0]} for one, so any bits will do for them. Check that the checkpoint was written to its end.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return request, found


def _note_plan(plan: Plan) -> None:
    """What is not as a user would expect, on stderr."""
    from alphaq.report.tables import check_words

    missed = {name: reason for name, reason in plan.unplanned.items() if "not an expert" not in reason}
    for name, reason in [*missed.items(), *plan.neutral.items()][:5]:
        err.print(f"note: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if plan.check is not None and plan.check.taken == "uniform":
        err.print(
            f"note: uniform bits are taken, since they change the model less ({check_words(plan.check)}); --no-check "
            "leaves the check out",
            highlight=False,
            soft_wrap=True,
        )
    if plan.unchecked is not None:
        err.print(
            f"note: not held against uniform bits: {plan.unchecked}", markup=False, highlight=False, soft_wrap=True
        )
    if plan.lower_bound is not None and plan.gap > 1e-6:
        err.print(f"note: this plan is proven to be within {plan.gap:.2g} (relative) of the best one", highlight=False)


def check_dtype(dtype: str) -> None:
    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise AlphaQError(unknown("--dtype", dtype, known))


def given_options(context: typer.Context) -> set[str]:
    """Names of the parameters that were typed, not left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def option_names(parameters: Iterable[str]) -> str:
    """Parameters as users type them."""
    return ", ".join("FILE" if name == "more" else f"--{name.replace('_', '-')}" for name in sorted(parameters))
