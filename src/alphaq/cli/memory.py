"""`--memory`: the memory that a model is to run in, as `plan` and `quantize` turn it into a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeAlias

from alphaq.cli.options import Asked, Shown
from alphaq.errors import BudgetError
from alphaq.nouns.option import settings_of
from alphaq.nouns.plan import Plan
from alphaq.nouns.serving import Memory, Serving
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.terminal import tell

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.engines.export import Hosting

ServingOptions: TypeAlias = Annotated[Asked[Serving], Shown(defaults={"memory_bytes": None})]


def serving_of(serving: Asked[Serving], asked: Asked[PlanConfig], searching: bool) -> Serving | None:
    """None without --memory. Raises BudgetError for a second budget, options without it, and other engines."""
    if serving.values["memory_bytes"] is None:
        if stray := sorted(serving.typed.values()):
            raise BudgetError(f"{', '.join(stray)} is part of --memory. Add --memory 16GiB, or drop it.")
        return None
    others = [one.flag for name, one in settings_of(Budget).items() if asked.values[name] is not None]
    if others := others + ["--ear"] * searching:
        raise BudgetError(f"--memory is a budget, and so is {' and '.join(others)}. Give one of them.")
    hosting_of(asked.values["engine"])
    return serving.build()


def hosting_of(engine: str) -> Hosting:
    """What an engine keeps beside the weights. Raises BudgetError where that is not known."""
    from alphaq.engines.profiles import profile

    hosting = profile(engine).writer.hosting
    if hosting is None:
        raise BudgetError(
            f"--memory asks llama.cpp what it keeps beside the weights; of {engine} that is not known. "
            "State the size of the weight files with --size, or use --engine llama.cpp."
        )
    return hosting


def plan_within(
    checkpoint: Checkpoint, config: PlanConfig, serving: Serving | None, plan_of: Callable[[PlanConfig], Plan]
) -> Plan:
    """The plan of a config, or of what a memory leaves. Raises BudgetError for none."""
    from alphaq.planning.placing import placed_plan

    config, memory = fitted(checkpoint, config, serving)
    return plan_of(config) if memory is None else placed_plan(checkpoint, config, memory, plan_of)


def fitted(checkpoint: Checkpoint, config: PlanConfig, serving: Serving | None) -> tuple[PlanConfig, Memory | None]:
    """The settings with the budget that the memory leaves, which is told on stderr. Raises BudgetError for none."""
    from alphaq.planning.memory import memory_of
    from alphaq.report.tables import memory_words

    if serving is None:
        return config, None
    memory = memory_of(checkpoint, config.engine, serving)
    tell(memory_words(memory))
    return config.model_copy(update={"budget": Budget(size_bytes=memory.weights)}), memory
