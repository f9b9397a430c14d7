"""`alphaq fit`: what of a model fits into a memory, how good and fast it is there, and the command that makes it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from alphaq.cli.converting import opened_for
from alphaq.cli.inputs import Inputs
from alphaq.cli.means import JsonOption, Means, ModelArgument, resources_for
from alphaq.cli.memory import hosting_of
from alphaq.cli.options import Asked, Shown
from alphaq.cli.planning import measured_rates, measurements, note_plan, note_unrated, plan_config
from alphaq.errors import AlphaQError, BudgetError
from alphaq.nouns.option import settings_of
from alphaq.nouns.rates import Rates
from alphaq.nouns.serving import Memory, Serving
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.terminal import note, show

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.nouns.plan import Plan
    from alphaq.planning.fitting import Fit
    from alphaq.report.curve import Curve

FitOptions: TypeAlias = Annotated[
    Asked[PlanConfig], Shown(without=tuple(settings_of(Budget)), defaults={"engine": "llama.cpp"})
]
HostOptions: TypeAlias = Annotated[Asked[Serving], Shown(defaults={"memory_bytes": None, "context": None})]
USUAL_CONTEXT = 4096


def fit(
    model: ModelArgument,
    asked: FitOptions,
    serving: HostOptions,
    means: Means,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="OUT", help="Also quantize it, into this folder.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file of what --json prints, for `alphaq plot curve`.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what of a model fits into this machine's memory (or --memory), how good and how fast, and how to make it."""
    from alphaq.checkpoint.writer import atomic_file, check_absent, check_file
    from alphaq.report.curve import curve_lines
    from alphaq.report.fits import fits_table

    if write is not None:
        check_absent(write)
        if as_json:
            raise AlphaQError("--write shows what `alphaq quantize` shows. Drop --json, or run the command it names.")
    if output is not None:
        check_file(output)
    hosting_of(asked.values["engine"])
    inputs = Inputs.of(asked)
    config = plan_config(asked, inputs, budget=Budget(size_bytes=1))
    rates = config.bandwidth or measured_rates(config)
    beside = Path() if write is None else write.absolute().parent
    few = config.share is not None and write is None
    with opened_for(config.engine, model, means, beside, headers_only=few) as checkpoint:
        host = _host(checkpoint, serving)
        found, curve = _fits(checkpoint, config, inputs, means, host, beside)
    chosen = found[0]
    assert chosen.plan is not None  # else there is an error
    note_plan(chosen.plan)
    note_unrated(rates, (one.plan for one in found))
    if config.bandwidth is None and serving.values["vram_bytes"] is not None:
        note("speeds take the card to be as slow as the processor; --bandwidth states what its memory and kernels do")
    command = _command(model, asked, chosen, means, write)
    told: dict[str, object] = {
        "bandwidth": str(rates),
        "command": command,
        "fits": [_told(one, rates) for one in found],
    }
    told["curve"] = None if curve is None else curve.model_dump(mode="json")
    if output is not None:
        with atomic_file(output) as unfinished:
            unfinished.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    drawn = "Nothing is lost at any size, so there is no curve." if curve is None else curve_lines(curve)
    show(
        as_json,
        told,
        fits_table(found, rates),
        f"Speeds: {_used(found, rates).words}.\n",
        drawn,
        f"\nMake it: {command}",
    )
    if write is not None:
        _written(command)


def _host(checkpoint: Checkpoint, serving: Asked[Serving]) -> Serving:
    """What was asked for, or this machine's memory and a usual context. Raises BudgetError."""
    from alphaq.checkpoint.files import memory_bytes
    from alphaq.planning.fitting import FREE_SHARE

    trained = checkpoint.text_config.get("max_position_embeddings")
    longest = trained if isinstance(trained, int) and trained > 0 else None
    context = serving.values["context"]
    if context is not None and longest is not None and context > longest:
        raise BudgetError(f"--context {context:,} is longer than the {longest:,} tokens that the model was made for.")
    known = {"context": context or min(USUAL_CONTEXT, longest or USUAL_CONTEXT)}
    if serving.values["memory_bytes"] is None:
        if not (installed := memory_bytes()):
            raise BudgetError("This system does not tell how much memory there is. State --memory 16GiB.")
        known["memory_bytes"] = int(installed * FREE_SHARE) // 2**20 * 2**20  # a round number to repeat
        note(f"of this machine's {installed / 2**30:.1f} GiB an eighth is left to the system; --memory states it")
    return serving.build(**known)


def _fits(
    checkpoint: Checkpoint, config: PlanConfig, inputs: Inputs, means: Means, host: Serving, beside: Path
) -> tuple[Sequence[Fit], Curve | None]:
    """What fits into the memory asked for, first, and into usual machines; and the curve of all sizes, if any.

    Raises BudgetError if nothing does.
    """
    from alphaq.planning import resolve
    from alphaq.planning.fitting import MACHINES_GIB, curve_plans, fits, least_bytes, of_machine
    from alphaq.planning.memory import memory_of
    from alphaq.report.tables import human_bytes

    memory = memory_of(checkpoint, config.engine, host)
    least = memory.kept.total + least_bytes(checkpoint, resolve(config).with_stored(checkpoint))
    if least > host.memory_bytes + (host.vram_bytes or 0):
        raise BudgetError(
            f"Nothing of {checkpoint.name} fits into {human_bytes(host.memory_bytes)}: with {host.cells:,} tokens of "
            f"context the narrowest choices need {human_bytes(least)}. State more --memory, less --context, a smaller "
            "--kv-type, or choose a smaller model."
        )
    sizes = [host.memory_bytes, *(of_machine(gib) for gib in MACHINES_GIB)]
    memories = [Memory(serving=host.model_copy(update={"memory_bytes": size}), kept=memory.kept) for size in sizes]
    with resources_for(checkpoint, means) as resources:
        inputs = inputs.made_for(checkpoint, resources, beside, config.bos)
        config = config.model_copy(update={"budget": Budget(size_bytes=memory.weights)})
        request, measured = measurements(checkpoint, config, inputs, resources, settle=False)
        found = list(fits(checkpoint, request, measured, memories, resources))
        plans = curve_plans(checkpoint, request, measured) if found[0].plan else []
    if found[0].plan is None:
        raise BudgetError(found[0].why)
    return found, _curve(checkpoint.name, plans, memories[1:])


def _curve(model: str, plans: Sequence[Plan], memories: Sequence[Memory]) -> Curve | None:
    """What is lost in plans of growing size, in nats where all of them say so; None where nothing is. memories: of
    usual machines."""
    from alphaq.planning.fitting import MACHINES_GIB
    from alphaq.report.curve import Curve, CurvePoint, Mark

    nats = all(plan.prediction is not None for plan in plans)
    lost = {
        plan.size_bytes or 0: plan.prediction.kl if nats and plan.prediction is not None else plan.objective or 0.0
        for plan in plans
    }
    points = tuple(CurvePoint(size_bytes=size, lost=value) for size, value in sorted(lost.items()) if value > 0)
    if not points:
        return None
    marks = [Mark(gib=gib, weights_bytes=one.weights) for gib, one in zip(MACHINES_GIB, memories, strict=True)]
    unit = "predicted KL, nats per token" if nats else "expected loss"
    return Curve(model=model, unit=unit, points=points, marks=tuple(marks))


def _told(one: Fit, rates: Rates) -> dict[str, object]:
    """A fit as JSON has it."""
    plan, speeds = one.plan, one.speeds(rates)
    told: dict[str, object] = {"memory_bytes": one.memory.serving.memory_bytes, "weights_bytes": one.memory.weights}
    if plan is None or speeds is None:
        return told
    return told | {
        "size_bytes": plan.size_bytes,
        "predicted_kl": None if plan.prediction is None else plan.prediction.kl,
        "objective": plan.objective,
        "read_bytes": plan.read_bytes,
        "tokens_per_second": speeds[0],
        "tokens_per_second_full": speeds[1],
    }


def _used(found: Sequence[Fit], rates: Rates) -> Rates:
    """Without the rates of what no plan uses."""
    return rates.among(name for one in found if one.plan and one.plan.reads for name in one.plan.reads.by_choice)


def _command(model: str, asked: Asked[PlanConfig], chosen: Fit, means: Means, write: Path | None) -> str:
    """The command that makes what was found, with everything that was typed for it, and measured here for a speed."""
    assert chosen.plan is not None  # the caller knows
    host, made = chosen.memory.serving, chosen.plan.settings
    words = ["alphaq", "quantize", model, "--engine", asked.values["engine"]]
    for name, setting in settings_of(Serving).items():
        value = getattr(host, name)
        if name in ("memory_bytes", "context") or value != setting.default:
            words += setting.words(value)
    for name in asked.typed:
        if name != "engine":
            setting = settings_of(PlanConfig)[name]
            words += setting.words(asked.parsed(name))
    if made is not None and made.min_speed is not None and "bandwidth" not in asked.typed:
        words += settings_of(PlanConfig)["bandwidth"].words(made.bandwidth)
    for name, setting in settings_of(Means).items():
        value = getattr(means, name)
        if value != setting.default:
            words += setting.words(value)
    return shlex.join([*words, "-o", str(write or "OUT")])


def _written(command: str) -> None:
    """Carry the command out, as it is typed. Ends this process as it ends, where it fails."""
    if code := subprocess.run([sys.executable, "-m", *shlex.split(command)]).returncode:
        raise typer.Exit(code)
