"""`--memory`: the memory that a model is to run in, as `plan` and `quantize` turn it into a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

from alphaq.cli.options import Asked, Shown
from alphaq.errors import BudgetError
from alphaq.nouns.option import settings_of
from alphaq.nouns.serving import Memory, Serving
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.terminal import tell

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint

ServingOptions: TypeAlias = Annotated[Asked[Serving], Shown(defaults={"memory_bytes": None})]


def serving_of(serving: Asked[Serving], asked: Asked[PlanConfig], searching: bool) -> Serving | None:
    """None without --memory. Raises BudgetError for a second budget, options without it, and other engines."""
    from alphaq.engines.profiles import profile

    if serving.values["memory_bytes"] is None:
        if stray := sorted(serving.typed.values()):
            raise BudgetError(f"{', '.join(stray)} is part of --memory. Add --memory 16GiB, or drop it.")
        return None
    others = [one.flag for name, one in settings_of(Budget).items() if asked.values[name] is not None]
    if others := others + ["--ear"] * searching:
        raise BudgetError(f"--memory is a budget, and so is {' and '.join(others)}. Give one of them.")
    if profile(asked.values["engine"]).writer.hosting is None:
        raise BudgetError(
            f"--memory asks llama.cpp what it keeps beside the weights; of {asked.values['engine']} that is not known. "
            "State the size of the weight files with --size, or use --engine llama.cpp."
        )
    return serving.build()


def fitted(checkpoint: Checkpoint, config: PlanConfig, serving: Serving | None) -> tuple[PlanConfig, Memory | None]:
    """The settings with the budget that the memory leaves, which is told on stderr. Raises BudgetError for none."""
    from alphaq.planning.memory import memory_of
    from alphaq.report.tables import memory_words

    if serving is None:
        return config, None
    memory = memory_of(checkpoint, config.engine, serving)
    tell(memory_words(memory))
    return config.model_copy(update={"budget": Budget(size_bytes=memory.weights)}), memory
