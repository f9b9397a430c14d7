"""What a model would cost in one engine at every size, by a share of its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from alphaq.checkpoint.reader import Checkpoint
from alphaq.measuring.resources import Resources
from alphaq.nouns.plan import Plan
from alphaq.planning.evidence import measure_for_plan
from alphaq.planning.fitting import curve_plans
from alphaq.planning.request import Request
from alphaq.planning.sampled import sampling_error


@dataclass(frozen=True)
class Price:
    """A plan with what it loses. lost: per weight, as the method counts errors; of a joint method that is the relative
    error, weighted by what each matrix counts, and 1 is a model without its experts. sampling_error: relative standard
    error of that by what was not read."""

    plan: Plan
    lost: float
    sampling_error: float


@dataclass(frozen=True)
class Priced:
    """Prices from the narrowest choices to the widest. unrouted: why experts are not weighed by their use, where the
    method would."""

    prices: list[Price]
    unrouted: str | None


def prices(checkpoint: Checkpoint, request: Request, resources: Resources) -> Priced:
    """What it costs at every size. Raises BudgetError and what measuring does."""
    measured = measure_for_plan(checkpoint, request, resources=resources, check_budget=False, settle=False)
    weights = int(measured.evidence.weights.sum())
    found = [
        Price(plan, (plan.objective or 0.0) / weights, sampling_error(plan, measured))
        for plan in curve_plans(checkpoint, request, measured)
    ]
    return Priced(found, measured.unrouted)
