"""The commands that make a plan and its output again, from what was recorded with them.

Options come from the fields of `PlanConfig` themselves, each at its own name, so that a new setting is repeated as
soon as it exists.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alphaq.engines.output import NO_OPTIONS, QuantizeOptions
from alphaq.errors import PlanError
from alphaq.nouns.plan import Plan, first_fault
from alphaq.nouns.settings import Budget, PlanConfig, Rule, option_of
from alphaq.sensitivity.methods import METHODS

# What a plan records otherwise than a user types it.
_TYPED: dict[str, Callable[[Any], str]] = {
    "min_sqnr_db": lambda decibels: f"{decibels}dB",
    "imatrix": lambda recorded: str(recorded).rpartition(" ")[0],  # a digest follows the name
}


@dataclass(frozen=True)
class Names:
    """What commands call things: the original model, None for what the plan says; the output; the file of stats."""

    model: str | None = None
    out: str = "OUT"
    stats: str | None = None


def reproduce(plan: Plan, options: QuantizeOptions = NO_OPTIONS, names: Names = Names()) -> list[tuple[str, str]]:
    """Pairs of what a step does and its command line, in order; empty for a plan that records no budget.

    Names of files that the plan only knows by their name (a text, an importance matrix) are repeated as they are.
    Raises PlanError if the settings are none.
    """
    config = config_of(plan)
    if config is None:
        return []
    steps = [("Plan", _plan_command(plan, config, options, names))]
    if plan.source is not None:
        model = names.model or plan.source.name
        report = ["alphaq", "report", names.out, "--model", model, "-o", "report.html"]
        return [*steps, *remake(plan, options, names), ("This report", shlex.join(report))]
    stats = names.stats or config.stats or "stats.csv"
    return [
        *steps,
        ("This report", shlex.join(["alphaq", "report", "plan.json", "--stats", stats, "-o", "report.html"])),
    ]


def remake(plan: Plan, options: QuantizeOptions, names: Names) -> list[tuple[str, str]]:
    """The steps from a plan in plan.json to a checked output."""
    model = names.model or (plan.source.name if plan.source is not None else "MODEL")
    given = [] if not plan.config.get("imatrix") else ["--imatrix", _TYPED["imatrix"](plan.config["imatrix"])]
    for name, value in options.model_dump(exclude_none=True).items():
        given += [option_of(name), f"{value}"]
    return [
        ("Quantize", shlex.join(["alphaq", "quantize", model, "--plan", "plan.json", *given, "-o", names.out])),
        ("Check what was written", shlex.join(["alphaq", "verify", names.out, "--source", model])),
    ]


def config_of(plan: Plan) -> PlanConfig | None:
    """A plan's settings, None if it records no budget. Raises PlanError if they are none of `alphaq plan`."""
    if "budget" not in plan.config:
        return None
    try:
        return PlanConfig.model_validate(plan.config)
    except ValueError as error:
        raise PlanError(
            f"The plan's config is not one of `alphaq plan`: {first_fault(error)}. Make it again."
        ) from None


def _plan_command(plan: Plan, config: PlanConfig, options: QuantizeOptions, names: Names) -> str:
    stats = names.stats if plan.source is None else None
    if plan.source is None and config.stats is None:  # numbers that came from no checkpoint came from a file
        config = config.model_copy(update={"stats": stats or "stats.csv"})
    elif stats is not None:
        config = config.model_copy(update={"stats": stats})
    words = ["alphaq", "plan", *([names.model or plan.source.name] if plan.source else [])]
    words += plan_options(config, "measured" if plan.source else "analytic")
    if options.pre_tokenizer is not None:
        words += ["--pre-tokenizer", options.pre_tokenizer]
    return shlex.join([*words, "-o", "plan.json"])


def plan_options(config: PlanConfig, usual_noise: str) -> list[str]:
    """Words of a command line that say what differs from the defaults and from what the method brings along.

    usual_noise: what the noise is where none is asked for.
    """
    method = METHODS.get(config.method)
    usual: dict[str, Any] = {"noise": usual_noise, **(method.preset if method is not None else {})}
    words: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value != field.default and (name not in usual or value != usual[name]):
            words += _words(name, value)
    return words


def _words(name: str, value: Any) -> list[str]:
    """One setting as it is typed."""
    if isinstance(value, Budget):
        return [word for unit, given in _given(value).items() for word in (option_of(unit), f"{given}")]
    if isinstance(value, bool):
        return [option_of(name) if value else f"--no-{option_of(name).removeprefix('--')}"]
    if isinstance(value, tuple):
        rules: tuple[Rule, ...] = value
        return [word for rule in rules for word in (option_of(name), f"{rule.pattern}={rule.value}")]
    return [option_of(name), _TYPED.get(name, str)(value)]


def _given(budget: Budget) -> Mapping[str, Any]:
    return budget.model_dump(exclude_none=True)
