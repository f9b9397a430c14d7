"""What the budget allows, and what pins, bounds and the engine leave open."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from alphaq.allocation.problem import Problem
from alphaq.errors import BudgetError, ChoiceError
from alphaq.formats.gaussian import gaussian_errors
from alphaq.formats.table import code_bits, format_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.settings import PlanConfig, Rule
from alphaq.planning.costs import costs_of
from alphaq.planning.reading import times_of, too_slow
from alphaq.planning.request import Request
from alphaq.planning.scope import Scope, names_nothing
from alphaq.sensitivity.base import Evidence


def problem_of(scope: Scope, evidence: Evidence | None = None) -> Problem:
    """What the budget allows, from shapes alone, and from `evidence` where a bound needs measured errors.

    Raises TooSmallError if it is infeasible, BudgetError if a bound names nothing, a unit is left without a choice, or
    none is fast enough.
    """
    problem, stated = open_problem(scope, evidence)
    check_feasible(problem, scope.request, stated, scope.matrices)
    times, rates = problem.times, scope.request.config.bandwidth
    if times is not None and rates is not None and (least := int(problem.unit_times.min(axis=1).sum())) > times.limit:
        raise too_slow(times, least, rates)
    return problem


def open_problem(scope: Scope, evidence: Evidence | None) -> tuple[Problem, Callable[[int], str]]:
    """The same, whether anything fits or not, and how a user writes a total cost as a budget."""
    request, checkpoint, units = scope.request, scope.checkpoint, scope.units
    if request.method.kind == "expert" and checkpoint.planned_role is not Role.EXPERT:
        raise BudgetError(
            f"--method {request.config.method} weighs routed experts, and {checkpoint.name} has none. Use auto, for "
            "one."
        )
    allowed = allowed_choices(scope)
    if evidence is not None:
        allowed &= _clear(scope, evidence)
    costs = costs_of(scope, evidence)
    times = times_of(scope, evidence)
    problem = Problem(
        units.names, units.owner, request.choices, costs.table, allowed, costs.limit, units.layers, request.rungs, times
    )
    return problem, costs.stated


def check_feasible(
    problem: Problem, request: Request, stated: Callable[[int], str], matrices: Sequence[MatrixRef] = ()
) -> None:
    """Raise TooSmallError if even the cheapest plan exceeds the budget, saying what it takes and what may be done.

    stated: how a user writes a total cost as a budget.
    """
    floor = int(problem.unit_costs.min(axis=1).sum())
    problem.check(str(request.config.budget), _least(problem, request, stated(floor), matrices))


def allowed_choices(scope: Scope) -> np.ndarray:
    """bool [matrices, choices] after offers, bounds, pins and what the engine can store.

    Raises BudgetError for a bound that names no matrix.
    """
    config, choices, matrices = scope.request.config, scope.request.choices, scope.matrices
    allowed = np.tile([choice in scope.request.offered for choice in choices], (len(matrices), 1))
    bits = np.array([code_bits(choice) for choice in choices])
    for rule in config.min_bits:
        allowed[_named(rule, "--min-bits", matrices)] &= bits >= rule.number("--min-bits")
    for rule in config.max_bits:
        allowed[_named(rule, "--max-bits", matrices)] &= bits <= rule.number("--max-bits")
    rows = {
        storable: np.array([choice in storable for choice in choices]) for storable in map(scope.storable, matrices)
    }
    for number, matrix in enumerate(matrices):
        if (pin := scope.pinned.get(matrix.name)) is not None:
            allowed[number] = [choice == pin for choice in choices]
        allowed[number] &= rows[scope.storable(matrix)]
    return allowed


def _named(rule: Rule, option: str, matrices: Sequence[MatrixRef]) -> list[int]:
    rows = [number for number, matrix in enumerate(matrices) if rule.matches(matrix)]
    if not rows:
        raise names_nothing(rule, option, matrices)
    return rows


def _clear(scope: Scope, evidence: Evidence) -> np.ndarray:
    """bool [matrices, choices]: no noisier than --min-sqnr allows, or pinned. Of joined matrices by a formula."""
    most, choices = most_noise(scope.request.config), scope.request.choices
    pinned = np.array([matrix.name in scope.pinned for matrix in scope.planned])
    relative = evidence.relative_errors if evidence.plain is None else evidence.plain
    clear = (relative <= most) | pinned[:, None]
    if not scope.joined:
        return clear
    usual = gaussian_errors(choices) <= most
    return np.vstack([clear, np.tile(usual, (len(scope.joined), 1))])


def most_noise(config: PlanConfig) -> float:
    """The largest relative squared error that --min-sqnr allows."""
    return math.inf if config.min_sqnr_db is None else 10 ** (-config.min_sqnr_db / 10)


def _least(problem: Problem, request: Request, least: str, matrices: Sequence[MatrixRef]) -> str:
    """The smallest feasible budget, the choices that matrices have in it, and the ways out."""
    cheapest = [problem.choices[column] for column in problem.chosen(problem.unit_costs.argmin(axis=1))]
    counts = sorted(Counter(cheapest).items())
    narrowest = counts[0][0]
    why = next(
        (
            f" ({reason})"
            for matrix, choice in zip(matrices, cheapest, strict=False)
            if choice != narrowest and (reason := request.profile.obstacle(narrowest, matrix))
        ),
        "",
    )
    mix = " and ".join(f"{count:,} at {choice}" for choice, count in counts).replace(" at", " matrices at", 1)
    if len(counts) == 1:
        mix = f"all at {narrowest}"
    return f"{least} with {mix}{why}. {', or '.join(_ways_out(request, narrowest, bool(why)))}"


def _ways_out(request: Request, narrowest: Choice, unfit: bool) -> list[str]:
    """What a user may do whose budget is too small. unfit: whether some matrices cannot take the narrowest choice."""
    config = request.config
    ways = ["Raise it"]
    if config.min_bits or config.pins or config.min_sqnr_db is not None:
        ways.append("relax pins and bounds")
    if _has_narrower(request, narrowest.bits):
        ways.append("allow narrower --choices")
    if unfit and request.method.by_widths:
        ways.append(f"use a method that mixes all types of {request.profile.name}, such as --method distortion")
    if narrowest.group_size in (32, 64) and format_of(narrowest).regroups:
        ways.append("use a larger --group-size")
    return ways


def _has_narrower(request: Request, bits: int) -> bool:
    """Whether the engine has a choice of fewer bits that the method would take."""
    if not request.method.by_widths:
        return any(choice.bits < bits for choice in request.profile.choices)
    for width in range(1, bits):
        with suppress(ChoiceError):
            return request.profile.with_bits(width).bits < bits
    return False
