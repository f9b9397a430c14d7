"""`alphaq quantize`: files that an engine loads, by a plan that is read or made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaq.cli.converting import opened_for
from alphaq.cli.inputs import Inputs, Sight, note_source, rounding_of
from alphaq.cli.means import JsonOption, Means, ModelArgument, RestartOption, output_target, resources_for
from alphaq.cli.memory import ServingOptions, plan_within, serving_of
from alphaq.cli.options import Asked
from alphaq.cli.planning import Made, build_plan, note_pace, plan_config, read_plan
from alphaq.cli.search import ANY_BUDGET, ScoringOptions, Search, Wanted, WantedOptions, search_plan
from alphaq.nouns.plan import Plan
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.serving import Serving
from alphaq.nouns.settings import PlanConfig
from alphaq.terminal import note, show, warn

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.checkpoint.remote import Store
    from alphaq.measuring.resources import Resources
    from alphaq.writing.records import QuantizeResult
    from alphaq.writing.rounding import Rounding

TokensOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens that gptq and learned look at; enough for the experts by default.")
]
MOST_NAMED = 5  # matrices that are named on stderr; --json has all


@dataclass(frozen=True)
class Order:
    """A plan that was read, or the settings of the one to make, with the search for it or the memory to run it in; a
    quantizer's name."""

    plan: Plan | None
    config: PlanConfig | None
    search: Search | None = None
    quantizer: str | None = None
    serving: Serving | None = None

    @property
    def decided(self) -> Plan | PlanConfig:
        """What knows the engine and the codec."""
        decided = self.plan or self.config
        assert decided is not None  # there is one of the two
        return decided

    @property
    def planned_on_text(self) -> bool:
        """Whether the text that was given is for the plan."""
        return self.config is not None and self.config.calibration is not None

    @property
    def bos(self) -> bool:
        """Whether the plan has windows begin with BOS."""
        config = self.config if self.plan is None else self.plan.config
        return config is None or config.bos


@dataclass(frozen=True)
class Job:
    """A checkpoint to quantize, and where to. scratch: folder for what is to be uploaded."""

    checkpoint: Checkpoint
    order: Order
    inputs: Inputs
    rounding: Rounding
    place: Path | Store
    scratch: Path | None
    means: Means
    restart: bool

    def run(self) -> tuple[Plan, QuantizeResult]:
        """Plan and quantize."""
        with resources_for(self.checkpoint, self.means) as resources:
            inputs = self.inputs.made_for(self.checkpoint, resources, self.beside, self.order.bos)
            job = replace(self, inputs=inputs)
            if job.order.plan is not None:
                note_source(job.checkpoint, job.order.plan.engine, job.inputs.imatrix)
            made = job.plan(resources)
            if resources.cache is not None:
                resources.cache.close()  # others may measure while this one writes
            note_pace(self.checkpoint, made.plan, resources)
            return made.plan, job.write(made, resources)

    def plan(self, resources: Resources) -> Made:
        """The plan that was read, or a new one."""
        order, checkpoint, inputs = self.order, self.checkpoint, self.inputs
        if order.plan is not None:
            return Made(order.plan, inputs.imatrix)
        assert order.config is not None  # then there is something to make one of
        if order.search is None:
            made: list[Made] = []

            def build(config: PlanConfig) -> Plan:
                made.append(build_plan(checkpoint, config, inputs, resources, order.quantizer))
                return made[-1].plan

            plan = plan_within(checkpoint, order.config, order.serving, build)
            return Made(plan, made[-1].imatrix)  # which no budget changes
        found = search_plan(checkpoint, order.config, inputs, order.search, resources, self.rounding, self.beside)
        return Made(found, inputs.imatrix)

    @property
    def beside(self) -> Path:
        """Folder for what is not kept."""
        return self.place.absolute().parent if isinstance(self.place, Path) else self.scratch or Path()

    def write(self, made: Made, resources: Resources) -> QuantizeResult:
        """Quantize by the plan."""
        from alphaq import pipeline

        plan = made.plan
        options = pipeline.WriteOptions(
            self.rounding, made.imatrix, self.restart, hash_contents=self.means.hash_contents
        )
        if isinstance(self.place, Path):
            return pipeline.quantize(self.checkpoint, plan, self.place, options, resources)
        return pipeline.quantize_to_store(self.checkpoint, plan, self.place, self.scratch or Path(), options, resources)


def quantize(
    model: ModelArgument,
    asked: Asked[PlanConfig],
    wanted: WantedOptions,
    scoring: ScoringOptions,
    serving: ServingOptions,
    means: Means,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write, also as an address (s3://...); must not exist.")
    ],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Use this plan instead of making one.")] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(help="How codes are found (see `alphaq quantizers`); the engine's usual way by default."),
    ] = None,
    calibration_tokens: TokensOption = None,
    restart: RestartOption = False,
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

    place = output_target(output, scratch)
    if isinstance(place, Path):
        check_absent(place)
    if plan_file is not None:
        others = (*_deciding(wanted, scoring, means), *serving.typed.values())
        read = read_plan(plan_file, asked, others)
        order, inputs = Order(read, None, None, quantizer), Inputs.of(asked).of_plan(read)
        if inputs.own is None:  # there is nothing to measure
            means = means.model_copy(update={"no_cache": True})
    else:
        search, inputs = Search.of(wanted, scoring, asked, means), Inputs.of(asked)
        host = serving_of(serving, asked, search is not None)
        config = plan_config(asked, inputs, budget=None if search is None and host is None else ANY_BUDGET)
        order = Order(None, config, search, quantizer, host)
        if wanted.values["curve"] is not None:
            check_file(wanted.values["curve"])
    sight = Sight(inputs.calibration, calibration_tokens, order.bos and asked.values["bos"])
    beside = place.absolute().parent if isinstance(place, Path) else scratch or Path()
    with opened_for(order.decided.engine, model, means, beside) as checkpoint:
        job = Job(checkpoint, order, inputs, _rounding(checkpoint, order, sight), place, scratch, means, restart)
        plan, result = job.run()
    _note_uncalibrated(result)
    show_quantized(plan, result, _usage(plan, result, job, output, model), as_json)


def _usage(plan: Plan, result: QuantizeResult, job: Job, output: str, model: str) -> str:
    """What to do with the output."""
    from alphaq.engines.profiles import profile
    from alphaq.report.verified import run_hint

    if not isinstance(job.place, Path):
        return "Uploaded."
    usage = profile(plan.engine).writer.used(output, result.files, plan.memory)
    made_first = not job.checkpoint.folder.exists()  # so there is nothing left to compare with
    hint = run_hint(plan.engine, output, model, job.checkpoint.plain)
    return usage if made_first else f"{usage}\n{hint}"


def _deciding(wanted: Asked[Wanted], scoring: Asked[Scoring], means: Means) -> Iterable[str]:
    """Options that decide about a plan to be made."""
    yield from wanted.typed.values()
    yield from scoring.typed.values()
    if means.no_cache:
        yield "--no-cache"
    if means.device is not None:
        yield "--device"


def _rounding(checkpoint: Checkpoint, order: Order, sight: Sight) -> Rounding:
    """How to round. Raises AlphaQError for what does not fit the source, the plan or each other."""
    from alphaq.quantizers.base import looks_at_inputs
    from alphaq.writing.planned import check_source
    from alphaq.writing.rounding import check_codable

    check_source(checkpoint, order.decided.engine)
    if order.planned_on_text and not looks_at_inputs(order.quantizer):
        sight = replace(sight, source=None)
    rounding = rounding_of(checkpoint, order.decided.engine, order.quantizer, sight)
    if order.decided.codec is not None:
        check_codable(rounding, order.decided.engine)
    return rounding


def _note_uncalibrated(result: QuantizeResult) -> None:
    left = result.not_calibrated
    warn(*(f"{name} is rounded without its inputs: {reason}" for name, reason in list(left.items())[:MOST_NAMED]))
    if len(left) > MOST_NAMED:
        warn(f"and {len(left) - MOST_NAMED} more; --json names them all")


def show_quantized(plan: Plan, result: QuantizeResult, usage: str, as_json: bool) -> None:
    """Print the plan and what was written by it."""
    from alphaq.report.tables import human_bytes, plan_table

    note(*result.notes)
    summary = (
        f"{result.out}: {human_bytes(result.size_bytes)} of weights, was {human_bytes(result.source_bytes)}; "
        f"{result.tensors} tensors re-read and correct\n{usage}"
    )
    tables = [summary] if plan.average_bits is None else [plan_table(plan), summary]
    show(as_json, {**plan.model_dump(mode="json", exclude={"table"}), **result.as_json()}, *tables)
