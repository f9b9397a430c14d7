"""The command line: arguments to config to pipeline, and nothing else.

With `--json` exactly one object goes to stdout; progress, tables and errors go to stderr. A user's
mistake ends with one line and exit code 2.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alphaq import __version__
from alphaq.config import Budget, PlanConfig
from alphaq.errors import AlphaQError, BudgetError
from alphaq.records import Plan, first_fault
from alphaq.registry import lookup, unknown

T = TypeVar("T")
PIPED_WIDTH = 120
err = Console(stderr=True)
app = typer.Typer(
    name="alphaq",
    help="Fit Mixture-of-Experts models into the memory you have, without calibration data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a safetensors checkpoint.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
BitsOption = Annotated[float | None, typer.Option(help="Budget: average code bits per expert weight.")]
BpwOption = Annotated[
    float | None, typer.Option(help="Budget: stored bits per expert weight, scales and zeros included.")
]
SizeOption = Annotated[str | None, typer.Option(help="Budget: total size of the weight files, e.g. 9.5MiB, 12GiB.")]
StatsOption = Annotated[
    Path | None, typer.Option(help="Scores from a CSV (name, alpha, variance) instead of measuring.")
]
ChoicesOption = Annotated[str, typer.Option(help="Candidates: bits, or bits and a group size (3g64,4g128).")]
GammaOption = Annotated[float, typer.Option(help="Exponent of the importance (α₀/α)^γ; 0 ignores the spectra.")]
NoiseOption = Annotated[
    str | None,
    typer.Option(help="analytic (Var·2^-2b) or measured (round trip; the default where weights are given)."),
]
MethodOption = Annotated[str, typer.Option(help="alphaq or uniform.")]
GroupOption = Annotated[int, typer.Option(help="Columns per scale, for choices that name none: 32, 64 or 128.")]
SymmetricOption = Annotated[bool, typer.Option("--symmetric", help="Store no zero points.")]
AttentionOption = Annotated[int, typer.Option(help="Bits of attention projections (16 keeps them).")]
SharedOption = Annotated[int, typer.Option(help="Bits of shared experts and dense MLPs (16 keeps them).")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Processes; all cores by default, fewer for a small model. Same result.")
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Measure anew and keep nothing for the next run.")]
HashOption = Annotated[
    bool, typer.Option("--hash-contents", help="Recognise weights by their contents, not by when they were written.")
]
DeviceOption = Annotated[str, typer.Option(help="Where eigenvalues are computed: cpu, cuda, cuda:1.")]


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
            console.print(table, markup=False, highlight=False, soft_wrap=isinstance(table, str))


def plan_config(
    bits: float | None,
    bpw: float | None,
    size: str | None,
    choices: str,
    gamma: float,
    noise: str | None,
    method: str,
    group_size: int,
    symmetric: bool,
    attention_bits: int,
    shared_bits: int,
) -> PlanConfig:
    """Check everything a plan is asked for before any work. Raises AlphaQError."""
    from alphaq.allocation.problem import SOLVERS

    if noise not in (None, "analytic", "measured"):
        raise AlphaQError(unknown("--noise", noise, ("analytic", "measured")))
    lookup("--method", SOLVERS, method)
    try:
        config = PlanConfig(
            budget=Budget.of(bits, bpw, size),
            choices=choices,
            gamma=gamma,
            noise=noise,  # type: ignore[arg-type]
            method=method,
            group_size=group_size,
            symmetric=symmetric,
            attention_bits=attention_bits,
            shared_bits=shared_bits,
        )
    except ValidationError as error:
        raise BudgetError(f"{first_fault(error)}. See `alphaq plan --help`.") from None
    config.candidates()
    config.fixed_choices()
    return config


def cache_folder() -> Path:
    """$ALPHAQ_CACHE, or alphaq in the user's cache folder."""
    if own := os.environ.get("ALPHAQ_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphaq"


@contextmanager
def _means(
    checkpoint: Any, workers: int | None, no_cache: bool = True, hash_contents: bool = False, device: str = "cpu"
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


def _build_plan(checkpoint: Any, config: PlanConfig, stats: Path | None, workers: Any, cache: Any, device: str) -> Plan:
    from alphaq import pipeline

    found = pipeline.measure_for_plan(checkpoint, config, stats, progress, workers, cache, device)
    plan = pipeline.make_plan(checkpoint, config, found)
    for name, reason in [*plan.unplanned.items(), *plan.neutral.items()][:5]:
        err.print(f"note: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if config.budget.bits is not None and (plan.average_bits or 0) < 0.99 * config.budget.bits:
        why = "uniform is one choice for all" if config.method == "uniform" else "no choice offered is wider"
        err.print(f"note: {plan.average_bits:.4g} of {config.budget.bits:g} bits are used; {why}", highlight=False)
    return plan


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
def analyze(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV to write.")] = Path("stats.csv"),
    revision: RevisionOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "cpu",
    no_cache: NoCacheOption = False,
    hash_contents: HashOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure every matrix's weight spectrum and write one CSV row each."""
    from alphaq import pipeline
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.checkpoint.writer import check_file

    check_file(output)
    checkpoint = open_checkpoint(model, revision)
    with _means(checkpoint, workers, no_cache, hash_contents, device) as (pool, cache):
        rows = pipeline.analyze(checkpoint, output, progress, pool, cache, device)
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
def plan(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plan file to write.")] = None,
    bits: BitsOption = None,
    bpw: BpwOption = None,
    size: SizeOption = None,
    stats: StatsOption = None,
    choices: ChoicesOption = "1,2,3,4",
    gamma: GammaOption = 1.0,
    noise: NoiseOption = None,
    method: MethodOption = "alphaq",
    group_size: GroupOption = 128,
    symmetric: SymmetricOption = False,
    attention_bits: AttentionOption = 4,
    shared_bits: SharedOption = 4,
    revision: RevisionOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "cpu",
    no_cache: NoCacheOption = False,
    hash_contents: HashOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose bits for every expert matrix under a budget; shows the plan, and writes it with -o."""
    config = plan_config(
        bits, bpw, size, choices, gamma, noise, method, group_size, symmetric, attention_bits, shared_bits
    )
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.checkpoint.writer import atomic_file, check_file
    from alphaq.report.tables import plan_table

    if output is not None:
        check_file(output)
    checkpoint = None if model is None else open_checkpoint(model, revision)
    with _means(checkpoint, workers, no_cache, hash_contents, device) as (pool, cache):
        made = _build_plan(checkpoint, config, stats, pool, cache, device)
    if output is not None:
        with atomic_file(output) as partial:
            partial.write_text(made.to_json(), encoding="utf-8")
        err.print(f"Plan written to {output}", markup=False, highlight=False, soft_wrap=True)
    show(as_json, json.loads(made.to_json()), plan_table(made))


@app.command()
def quantize(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Use this plan instead of making one.")] = None,
    bits: BitsOption = None,
    bpw: BpwOption = None,
    size: SizeOption = None,
    stats: StatsOption = None,
    choices: ChoicesOption = "1,2,3,4",
    gamma: GammaOption = 1.0,
    noise: NoiseOption = None,
    method: MethodOption = "alphaq",
    group_size: GroupOption = 128,
    symmetric: SymmetricOption = False,
    attention_bits: AttentionOption = 4,
    shared_bits: SharedOption = 4,
    revision: RevisionOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "cpu",
    no_cache: NoCacheOption = False,
    hash_contents: HashOption = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan and quantize a checkpoint, then re-read the result against the source."""
    from alphaq.checkpoint.writer import check_absent
    from alphaq.report.tables import human_bytes, plan_table

    check_absent(output)
    if plan_file is not None:
        beside = {"model", "output", "plan_file", "revision", "as_json", "workers", "hash_contents", "restart"}
        if conflicting := _given(context) - beside:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(conflicting))
            raise BudgetError(f"--plan already decides everything that {names} would. Drop one or the other.")
        if not plan_file.is_file():
            raise BudgetError(
                f"No plan file {plan_file}. Make one with `alphaq plan MODEL --bits 2.5 -o {plan_file.name}`."
            )
        made = Plan.from_json(plan_file.read_bytes(), str(plan_file))
    else:
        config = plan_config(
            bits, bpw, size, choices, gamma, noise, method, group_size, symmetric, attention_bits, shared_bits
        )
    from alphaq import pipeline
    from alphaq.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(model, revision)
    with _means(checkpoint, workers, no_cache or plan_file is not None, hash_contents, device) as (pool, cache):
        if plan_file is None:
            made = _build_plan(checkpoint, config, stats, pool, cache, device)
        if cache is not None:
            cache.close()  # others may measure while this one writes
        result = pipeline.quantize(checkpoint, made, output, progress, pool, restart, hash_contents)
    summary = (
        f"{output}: {human_bytes(result['size_bytes'])} of weights, was {human_bytes(result['source_bytes'])}; "
        f"{result['tensors']} tensors re-read and correct"
    )
    tables = [summary] if made.average_bits is None else [plan_table(made), summary]
    figures = json.loads(made.to_json())
    show(as_json, figures | result, *tables)


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
    show(
        as_json,
        {"ok": True, **result},
        f"{output}: all {result['tensors']} tensors are as planned ({result['quantized']} quantized, "
        f"mean relative error {result['mean_relative_error']:.4g})",
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
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise AlphaQError(unknown("--dtype", dtype, ("auto", "float32", "bfloat16", "float16")))
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
    """Entry point. Exit codes: 0 done, 2 a user's mistake, 130 interrupted; a defect keeps its traceback."""
    command = typer.main.get_command(app)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = command.main(args=arguments, prog_name="alphaq", standalone_mode=False)
    except AlphaQError as error:
        _fail(str(error))
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
