"""Where more samples could change the plan: the value of knowing an error better, in units of the loss.

At the price λ of the solved budget every unit takes the choice of least L + λ·cost. Another choice is worse by a gap g,
which is known up to a standard error s. What is to be gained by knowing it is at most

    E[max(0, −g + s·z)] = s·φ(g/s) − g·Φ(−g/s),   z standard normal,

and measuring goes on as long as that is more than a five-thousandth of a unit's mean loss for some choice of some unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from alphaq.allocation.problem import Problem
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.planning.matrices import Survey, measure_errors
from alphaq.planning.measured import Measurements
from alphaq.planning.plan import solved
from alphaq.planning.samples import Samples
from alphaq.planning.scope import Scope
from alphaq.planning.solving import Answer

WORTH = 2e-4
"""Share of a unit's mean loss that an error's sample must promise to be taken."""


def stageable(scope: Scope) -> bool:
    """Whether a plan's errors can be measured in stages: where a price says what matters, and weights lie at hand.

    Those of a store would be fetched twice. Coded bytes are measured of whole matrices, with their errors.
    """
    config = scope.request.config
    decides = scope.request.method.kind in ("loss", "order") and not config.per_layer and config.min_speed is None
    return decides and config.noise == "measured" and config.codec is None and scope.checkpoint.store is None


def settle_further(
    survey: Survey, several: Sequence[Samples], measurements: Measurements, resources: Resources
) -> bool:
    """Measure what the plan is still uncertain of, and what it chose unseen; False if nothing of that is left."""
    scope = survey.scope
    answer, _ = solved(scope, measurements)
    unit_of = scope.request.profile.unit_of
    chosen = {unit_of(one): frozenset({answer.choices[one.name]}) for one in scope.matrices}
    # An order goes by no errors.
    open_ = undecided_choices(scope, measurements, answer) if scope.request.method.kind == "loss" else {}
    for wanted in (chosen, open_):  # those that join are sampled each by itself
        wanted.update({one.name: wanted[unit_of(one)] for one in scope.joined if unit_of(one) in wanted})
    further = [(samples, one) for samples in several for one in samples.further(open_, chosen)]
    for samples, sampling in further:
        measure_errors(survey, samples, sampling, resources, "measure what decides")
    return bool(further)


def undecided_choices(scope: Scope, measurements: Measurements, answer: Answer) -> dict[str, frozenset[Choice]]:
    """Choices by unit whose errors are worth knowing better, those that they would take the place of among them."""
    assert measurements.deviations is not None  # errors were measured
    none = np.zeros(len(scope.request.choices))
    rest = [measurements.joined_deviations.get(matrix.name, none) for matrix in scope.joined]
    deviations = np.vstack([measurements.deviations, *rest])
    problem = answer.problem
    table = undecided(problem, answer.losses, deviations, answer.solution.price)
    return {
        unit: frozenset(choice for choice, open_ in zip(problem.choices, row, strict=True) if open_)
        for unit, row in zip(problem.units, table.tolist(), strict=True)
        if any(row)
    }


def undecided(problem: Problem, losses: np.ndarray, deviations: np.ndarray, price: float) -> np.ndarray:
    """bool [units, choices]: worth knowing better. losses: [matrices, choices]; deviations: relative standard errors of
    the sum over what was sampled together with a matrix, [matrices, choices], of which a unit's largest counts. price:
    loss per unit of cost."""
    totals = problem.allowed_only(problem.per_unit(losses))
    of_unit = np.zeros(totals.shape)
    np.maximum.at(of_unit, problem.owner, deviations)
    errors = totals * problem.allowed_only(of_unit)
    reduced = totals + price * problem.unit_costs
    units, best = np.arange(len(totals)), reduced.argmin(axis=1)
    gaps = reduced - reduced[units, best][:, None]
    uncertain = np.hypot(errors, errors[units, best][:, None])
    gains = expected_gain(gaps, uncertain)
    gains[units, best] = 0.0
    open_ = (gains > WORTH * totals[units, best].mean()) & problem.unit_allowed
    open_[units, best] |= open_.any(axis=1)
    return open_


def expected_gain(gaps: np.ndarray, uncertain: np.ndarray) -> np.ndarray:
    """E[max(0, s·z − g)] of gaps g ≥ 0 and standard errors s, of any one shape."""
    scale = np.where(uncertain > 0, uncertain, 1.0)
    ratio = gaps / scale
    beyond = torch.special.ndtr(torch.from_numpy(-ratio)).numpy()
    gain = scale * (np.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi) - ratio * beyond)
    return np.where(uncertain > 0, gain, 0.0)
