"""What fits: one measurement of a model, and a plan for each of several memories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError
from alphaq.measuring.resources import Resources
from alphaq.nouns.plan import Plan
from alphaq.nouns.rates import SECOND_NS, Rates
from alphaq.nouns.serving import Memory
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning.check import checked_plan
from alphaq.planning.limits import problem_of
from alphaq.planning.measured import Measurements
from alphaq.planning.placing import placed_plan
from alphaq.planning.plan import make_plan
from alphaq.planning.request import Request
from alphaq.planning.scope import Scope

MACHINES_GIB = (8, 12, 16, 24, 32, 48, 64)
FREE_SHARE = 7 / 8  # of a machine's memory, which the system and other programs leave
ENOUGH = 2**62
STEPS = 12  # points of a curve


@dataclass(frozen=True)
class Fit:
    """The best plan in a memory; None where there is none, and why. full_bytes: of the cache of one sequence, which a
    token reads too once the context is full."""

    memory: Memory
    plan: Plan | None
    why: str = ""

    @property
    def full_bytes(self) -> int:
        return self.memory.kept.cache_bytes // self.memory.serving.parallel

    def speeds(self, rates: Rates) -> tuple[float, float] | None:
        """Tokens per second at first and once the context is full, of a plan that says what a token reads."""
        if self.plan is None or self.plan.reads is None:
            return None
        taken = max(1, rates.token_time_ns(self.plan.reads.by_choice, self.plan.reads.layers))
        return SECOND_NS / taken, SECOND_NS / (taken + self.full_bytes * SECOND_NS / rates.memory)


def of_machine(gib: float) -> int:
    """Bytes that a machine of so much memory leaves for a model."""
    return int(gib * 2**30 * FREE_SHARE)


def least_bytes(checkpoint: Checkpoint, request: Request) -> int:
    """Bytes of weight files at the narrowest choices, whatever their speed. Raises BudgetError for a speed that no
    choices reach."""
    whole = request.config.model_copy(update={"budget": Budget(size_bytes=ENOUGH)})
    problem = problem_of(Scope.of(checkpoint, replace(request, config=whole)))
    return ENOUGH - problem.limit + int(problem.unit_costs.min(axis=1).sum())


def sizes_between(least: int, most: int, count: int = STEPS) -> list[int]:
    """Sizes of weight files in even ratios, both ends included."""
    return [round(least * (most / least) ** (step / (count - 1))) for step in range(count)] if most > least else [least]


def curve_plans(checkpoint: Checkpoint, request: Request, measured: Measurements) -> list[Plan]:
    """Plans from the narrowest choices to the widest, of all experts."""

    def of_size(size: int) -> Plan:
        changes = {"budget": Budget(size_bytes=size), "min_speed": None}
        return make_plan(checkpoint, replace(request, config=request.config.model_copy(update=changes)), measured)

    least, widest = least_bytes(checkpoint, request), of_size(ENOUGH)
    return [*(of_size(size) for size in sizes_between(least, widest.size_bytes or least)[:-1]), widest]


def fits(
    checkpoint: Checkpoint, request: Request, measured: Measurements, memories: Iterable[Memory], resources: Resources
) -> Iterator[Fit]:
    """A plan for each memory, of errors that were measured for any budget.

    The first is what `alphaq quantize` makes. Those of further memories are not tried beside uniform bits, for which
    the model is run each time.
    """

    def plan_of(config: PlanConfig) -> Plan:
        return checked_plan(checkpoint, replace(request, config=config), measured, resources)

    for number, memory in enumerate(memories):
        config = request.config if number == 0 else request.config.model_copy(update={"check": False})
        try:
            yield Fit(memory, placed_plan(checkpoint, config, memory, plan_of))
        except BudgetError as error:
            yield Fit(memory, None, str(error))
