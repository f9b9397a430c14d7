"""The commands that make a plan and its output again, from what was recorded with them.

Options come from the fields of `PlanConfig` themselves, so that a new setting is repeated as soon as it exists.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from pydantic import BaseModel

from alphaq.engines.output import NO_OPTIONS, QuantizeOptions
from alphaq.engines.profiles import ENGINES
from alphaq.nouns.option import settings_of
from alphaq.nouns.plan import Plan, Refinement
from alphaq.nouns.settings import PlanConfig
from alphaq.sensitivity.methods import METHODS

UNREFINED = "unrefined.json"
"""The plan that a refined one, plan.json, was made from."""


@dataclass(frozen=True)
class Names:
    """What commands call things: the original model, None for what the plan says; the output; the file of stats."""

    reference: str | None = None
    out: str = "OUT"
    stats: str | None = None


def reproduce(plan: Plan, options: QuantizeOptions = NO_OPTIONS, names: Names = Names()) -> list[tuple[str, str]]:
    """Pairs of what a step does and its command line, in order; empty for a plan that records no budget.

    Names of files that the plan only knows by their name (a text, an importance matrix) are repeated as they are.
    """
    if (config := plan.settings) is None:
        return []
    steps = [("Plan", _plan_command(plan, config, options, names))]
    if plan.refined is not None and plan.source is not None:
        steps.append(("Refine", _refine_command(plan, plan.refined, options, names.reference or plan.source.name)))
    if plan.source is not None:
        reference = names.reference or plan.source.name
        report = ["alphaq", "report", names.out, "--reference", reference, "-o", "report.html"]
        return [*steps, *remake(plan, options, names), ("This report", shlex.join(report))]
    stats = names.stats or config.stats or "stats.csv"
    return [
        *steps,
        ("This report", shlex.join(["alphaq", "report", "plan.json", "--stats", stats, "-o", "report.html"])),
    ]


def remake(plan: Plan, options: QuantizeOptions, names: Names) -> list[tuple[str, str]]:
    """The steps from a plan in plan.json to a checked output."""
    reference = names.reference or (plan.source.name if plan.source is not None else "MODEL")
    words = [] if plan.imatrix is None else settings_of(PlanConfig)["imatrix"].words(plan.imatrix)
    for name, value in options.model_dump(exclude_none=True).items():
        words += [f"--{name.replace('_', '-')}", f"{value}"]
    return [
        ("Quantize", shlex.join(["alphaq", "quantize", reference, "--plan", "plan.json", *words, "-o", names.out])),
        ("Check what was written", shlex.join(["alphaq", "verify", names.out, "--reference", reference])),
    ]


def _plan_command(plan: Plan, config: PlanConfig, options: QuantizeOptions, names: Names) -> str:
    stats = names.stats if plan.source is None else None
    if plan.source is None and config.stats is None:  # numbers that came from no checkpoint came from a file
        config = config.model_copy(update={"stats": stats or "stats.csv"})
    elif stats is not None:
        config = config.model_copy(update={"stats": stats})
    words = ["alphaq", "plan", *([names.reference or plan.source.name] if plan.source else [])]
    words += plan_options(config, "measured" if plan.source else "analytic")
    words += ["--imatrix", "none"] if plan.source is not None and _own_is_usual(config) else []
    return shlex.join([*words, *_pre_tokenizer(options), "-o", "plan.json" if plan.refined is None else UNREFINED])


def _own_is_usual(config: PlanConfig) -> bool:
    """Whether the command would make the model's own importance matrix, which the plan was made without."""
    method = METHODS.get(config.method)
    llama = config.engine in ENGINES and ENGINES[config.engine].importance is not None
    return llama and config.imatrix is None and method is not None and method.needs_fisher


def _refine_command(plan: Plan, refined: Refinement, options: QuantizeOptions, reference: str) -> str:
    words = ["alphaq", "refine", reference, "--plan", UNREFINED, "--seed", str(refined.seed)]
    words += [] if plan.imatrix is None else settings_of(PlanConfig)["imatrix"].words(plan.imatrix)
    words += ["--gradients", str(refined.gradients), "--by", refined.by]
    words += [] if refined.gradient_tokens is None else ["--tokens", str(refined.gradient_tokens)]
    return shlex.join([*words, *_pre_tokenizer(options), "-o", "plan.json"])


def _pre_tokenizer(options: QuantizeOptions) -> list[str]:
    return [] if options.pre_tokenizer is None else ["--pre-tokenizer", options.pre_tokenizer]


def plan_options(config: PlanConfig, usual_noise: str) -> list[str]:
    """Words of a command line that say what differs from the defaults and from what the method brings along.

    usual_noise: what the noise is where none is asked for.
    """
    method = METHODS.get(config.method)
    usual = {"noise": usual_noise, **(method.preset if method is not None else {})}
    return _words(config, usual)


def _words(record: BaseModel, usual: dict[str, object]) -> list[str]:
    """Settings that are neither at their default nor the usual ones, as they are typed."""
    words: list[str] = []
    settings = settings_of(type(record))
    for name in type(record).model_fields:
        value = getattr(record, name)
        if isinstance(value, BaseModel) and name not in settings:  # others are typed as one text
            words += _words(value, {})
        elif value != settings[name].default and (name not in usual or value != usual[name]):
            words += settings[name].words(value)
    return words
