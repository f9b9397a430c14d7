"""Plans as commands make them: checked before any work, and what a user should know of them said on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alphaq.cli.inputs import Inputs, Own, note_importance, note_source, text_of
from alphaq.cli.means import cache_folder
from alphaq.cli.options import Asked
from alphaq.errors import AlphaQError, BudgetError, MissingExtraError
from alphaq.formats.table import code_bits
from alphaq.nouns.option import settings_of
from alphaq.nouns.plan import Plan
from alphaq.nouns.rates import Rates
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.terminal import complain, note, progress, warn

if TYPE_CHECKING:
    from alphaq.calibration.fisher import Fisher
    from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.measuring.resources import Resources
    from alphaq.planning import Measurements, Request
    from alphaq.trials.rates import Measured

WORTH_TELLING = 0.01  # of what a token reads
NAMED_ONLY = ("calibration", "imatrix")  # a plan holds the names of these files, not the files


@dataclass(frozen=True)
class Made:
    """A plan, and the importance matrix that it was made with."""

    plan: Plan
    imatrix: ImportanceMatrix | None


def plan_config(
    asked: Asked[PlanConfig], inputs: Inputs, with_model: bool = True, budget: Budget | None = None
) -> PlanConfig:
    """Check everything a plan is asked for before any work. budget: instead of the one that was typed.

    Raises AlphaQError.
    """
    from alphaq.planning import resolve

    config = asked.build(budget=budget or _budget(asked), calibration=None, **inputs.names)
    if config.min_speed is not None and config.bandwidth is None:
        config = config.model_copy(update={"bandwidth": measured_rates(config)})
    if inputs.stats is not None and (config.spectrum, config.tail) != ("farms", "hill"):
        raise AlphaQError("--stats already holds α, so --spectrum and --tail decide nothing. Drop one or the other.")
    request = resolve(config, with_model)
    request.check_speed()
    config = config.model_copy(update={"bandwidth": request.config.bandwidth})
    text = text_of(inputs.calibration) if request.method.needs_text else None
    return config if text is None else config.model_copy(update={"calibration": text.name})


def measured_rates(config: PlanConfig) -> Rates:
    """How fast this machine reads what a plan may choose, measured where that was not done before."""
    from alphaq.planning import resolve
    from alphaq.trials.rates import rates_here
    from alphaq.work.cores import available_cores

    request = resolve(
        config.model_copy(update={"bandwidth": Rates(memory=1)})
    )  # any, to be refused before it is measured
    request.check_speed()
    found = rates_here(cache_folder(), config.engine, (*request.choices, *request.plain), progress)
    if found.missing:
        note(
            f"{config.engine} is not measured here, so every format counts as fast as this machine's memory, "
            f"{found.rates.words}; --bandwidth states another's ({found.missing})"
        )
        return found.rates
    note(
        f"speeds are those of {config.engine}'s kernels on this machine's processor, {available_cores()} threads, as "
        "measured; --bandwidth states others"
    )
    warn_doubtful(config.engine, found)
    return found.rates


def warn_doubtful(engine: str, found: Measured) -> None:
    """Say which measurements others have disturbed."""
    if found.doubtful:
        names = ", ".join(sorted(found.doubtful))
        warn(
            f"{engine}'s speeds are uncertain, and not kept: measured again and again, {names} took very different "
            "times. End other programs and repeat the command, or state --bandwidth"
        )


def note_unrated(rates: Rates | None, plans: Iterable[Plan | None]) -> None:
    """Say which formats of plans count as fast as memory beside others that have rates of their own."""
    shares: dict[str, float] = {}
    for plan in plans:
        if rates is not None and plan is not None and plan.reads is not None:
            for name, share in rates.unrated(plan.reads.by_choice).items():
                shares[name] = max(share, shares.get(name, 0.0))
    if told := [f"{name} ({100 * share:.0f} %)" for name, share in sorted(shares.items()) if share >= WORTH_TELLING]:
        warn(
            f"no rate is known of {', '.join(told)} of the bytes that a token reads: that counts as fast as memory, so "
            "speeds are too high; --bandwidth states rates"
        )


def _budget(asked: Asked[PlanConfig]) -> Budget:
    """Raises BudgetError unless exactly one is stated."""
    return Budget.of(*(asked.values[name] for name in settings_of(Budget)))


def read_plan(path: Path, asked: Asked[PlanConfig], others: Iterable[str] = ()) -> Plan:
    """A plan file, unless an option would decide what the plan has decided otherwise. others: options that would.

    Raises BudgetError naming the options, or PlanError.
    """
    conflicting, engine = set(others), ""
    if not conflicting:
        if not path.is_file():
            raise BudgetError(f"No plan file {path}. Make one with `alphaq plan MODEL --bits 2.5 -o {path.name}`.")
        plan = Plan.read(path)
        same = said_by(plan, asked)
        conflicting = {flag for name, flag in asked.typed.items() if name not in (*NAMED_ONLY, *same)}
        if not conflicting:
            return plan
        engine = f" (it is for {plan.engine})" if "--engine" in conflicting else ""
    options = ", ".join(sorted(conflicting))
    raise BudgetError(f"--plan already decides everything that {options} would{engine}. Drop one or the other.")


def said_by(plan: Plan, asked: Asked[PlanConfig]) -> set[str]:
    """Which of the settings that were typed a plan has alike."""
    config = plan.settings
    same = {"engine"} if asked.values["engine"] == plan.engine else set()
    budgets = asked.typed.keys() & settings_of(Budget).keys()
    if config is not None and budgets and _budget(asked) == config.budget:
        same |= budgets
    for name in asked.typed.keys() - {"engine", "stats", *NAMED_ONLY, *settings_of(Budget)}:
        if config is not None and asked.parsed(name) == getattr(config, name):
            same.add(name)
    return same & asked.typed.keys()


def build_plan(
    checkpoint: Checkpoint | None,
    config: PlanConfig,
    inputs: Inputs,
    resources: Resources,
    quantizer: str | None = None,
) -> Made:
    """Measure and plan; says on stderr what a user would not expect. quantizer: that was asked for, if any."""
    from alphaq import planning

    request, measured = measurements(checkpoint, config, inputs, resources, quantizer)
    plan = planning.checked_plan(checkpoint, request, measured, resources)
    note_plan(plan)
    note_unrated(config.bandwidth, [plan])
    widest = max(map(code_bits, request.offered))
    if config.budget.bits is not None and config.budget.bits > widest:
        note(f"no choice offered is wider than {widest:g} bits, so the budget is not used up")
    return Made(plan, measured.own_imatrix or inputs.imatrix)


def measurements(
    checkpoint: Checkpoint | None,
    config: PlanConfig,
    inputs: Inputs,
    resources: Resources,
    quantizer: str | None = None,
    settle: bool = True,
) -> tuple[Request, Measurements]:
    """The config made concrete, and what must be known for its plan; for those of any budget unless `settle`.

    Raises AlphaQError for options of no use.
    """
    from alphaq import planning

    named = config.model_copy(update=inputs.names)  # an importance matrix has its digest only now
    request = planning.resolve(named, checkpoint is not None).with_stored(checkpoint)
    method = request.config.method
    if config.gamma != "auto" and method not in ("alphaq", "paper"):
        raise BudgetError(f"--gamma applies only to methods alphaq and paper, not to {method}. Drop it.")
    text = text_of(inputs.calibration, config.bos) if request.method.needs_text else None
    if inputs.calibration is not None and text is None and quantizer is None:
        raise BudgetError(f"--calibration does nothing for method {method}. Drop it.")
    if checkpoint is not None:
        note_source(checkpoint, config.engine, inputs.imatrix)
        if config.bos and {"fisher", "synthetic"} & {*request.method.needs}:
            _note_tokenizer(checkpoint)
    own = inputs.own is Own.USUAL and request.profile.importance is not None and request.method.needs_fisher
    given = planning.PlanInputs(inputs.stats, text, inputs.imatrix, _own_importance if own else None)
    measured = planning.measure_for_plan(checkpoint, request, given, resources, settle=settle)
    if own and checkpoint is not None:
        request = _with_own(request, checkpoint, measured.own_imatrix)
    if measured.evidence.synthetic is not None:
        note(*measured.evidence.synthetic.notes)
    note_unrouted(measured.unrouted)
    if zeros := measured.zeros:
        complain(
            f"warning: {len(zeros):,} of {len(measured.evidence.names):,} planned matrices hold nothing but zeros, "
            f"{zeros[0]} for one, so any bits will do for them. Check that the checkpoint was written to its end."
        )
    return request, measured


def note_unrouted(why: str | None) -> None:
    """Say why experts are not weighed by their use, where a method would."""
    if why is not None:
        note(f"all experts of a layer count alike, since how often each is used takes a pass through the model: {why}")


def _own_importance(checkpoint: Checkpoint, passed: Fisher) -> ImportanceMatrix:
    from alphaq.writing.observing import importance_of_losses

    return importance_of_losses(checkpoint, passed)


def _with_own(request: Request, checkpoint: Checkpoint, own: ImportanceMatrix | None) -> Request:
    """The request, with the name of the importance matrix that its pass gave; says on stderr where it gave none."""
    if own is None:
        note(
            "no importance matrix is used, as the model cannot be run backward here; --imatrix self makes one of what "
            "llama.cpp sees"
        )
        return request
    note_importance(checkpoint, own)
    return replace(request, config=request.config.model_copy(update={"imatrix": f"{own.name} {own.digest}"}))


def _note_tokenizer(checkpoint: Checkpoint) -> None:
    from alphaq.calibration.tokens import tokenizer_fault

    if fault := tokenizer_fault(checkpoint):
        warn(f"the model's tokenizer cannot be loaded ({fault}), so passes begin without BOS")


def note_pace(checkpoint: Checkpoint, plan: Plan, resources: Resources) -> None:
    """Say how long quantizing by a plan will take, where it takes long."""
    from alphaq.writing.pace import pace_of

    try:
        pace = pace_of(checkpoint, plan, resources.pool(checkpoint))
    except MissingExtraError:  # without the engine's quantizers nothing can be tried, nor quantized
        return
    if pace is not None and (told := pace.note):
        note(told)


def note_plan(plan: Plan) -> None:
    """Say what is not as a user would expect."""
    from alphaq.report.tables import check_words

    missed = {name: reason for name, reason in plan.unplanned.items() if "not an expert" not in reason}
    note(*(f"{name}: {reason}" for name, reason in [*missed.items(), *plan.neutral.items()][:5]))
    if plan.check is not None and plan.check.taken == "uniform":
        warn(
            f"uniform bits are taken, since they change the model less ({check_words(plan.check)}); --no-check "
            "leaves the check out"
        )
    if plan.unpredicted is not None:
        warn(f"losses come from the signal, so no KL is predicted: {plan.unpredicted}")
    if plan.unchecked is not None:
        warn(f"not compared with uniform bits: {plan.unchecked}")
    if plan.dropped is not None and plan.dropped.gap > 1e-6:
        note(f"no other numbers of experts are better by more than {plan.dropped.gap:.2g} (relative), which is proven")
    if plan.equal_instead:
        note("every layer loses as many experts: no plan with numbers of their own was found to fit the budget")
    if plan.lower_bound is not None and plan.gap > 1e-6:
        note(f"this plan is proven to be within {plan.gap:.2g} (relative) of the best one")
