"""The stage that makes a plan: what is asked for, what must be known for it, what the budget allows, what is best."""

from alphaq.planning.check import checked_plan
from alphaq.planning.costs import nominal_bytes, plain_size
from alphaq.planning.evidence import measure_for_plan
from alphaq.planning.limits import problem_of
from alphaq.planning.measured import Measurements, PlanInputs
from alphaq.planning.plan import make_plan
from alphaq.planning.request import Request, resolve
from alphaq.planning.scope import Scope
from alphaq.planning.together import measure_for_plans

__all__ = [
    "Measurements",
    "PlanInputs",
    "Request",
    "Scope",
    "checked_plan",
    "make_plan",
    "measure_for_plan",
    "measure_for_plans",
    "nominal_bytes",
    "plain_size",
    "problem_of",
    "resolve",
]
