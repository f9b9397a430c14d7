"""A problem solved by a method's rule, and the answer put into words: the parts of a plan that need no checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

import alphaq
from alphaq.allocation.problem import RANKED, Problem, solve_experts, solve_losses
from alphaq.allocation.solution import Solution
from alphaq.errors import BudgetError
from alphaq.formats.table import code_bits
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan, PlanTable
from alphaq.planning.measured import Measurements
from alphaq.planning.request import Request
from alphaq.sensitivity.base import Evidence
from alphaq.sensitivity.importance import resolved_gamma


@dataclass(frozen=True)
class Answer:
    """A problem solved. names: of its matrices, the planned ones first. losses: what the solution is judged by
    [matrices, choices]."""

    problem: Problem
    names: tuple[str, ...]
    solution: Solution
    losses: np.ndarray

    @cached_property
    def columns(self) -> np.ndarray:
        """int [matrices]: the choice of each."""
        return self.problem.chosen(self.solution.columns)

    @cached_property
    def choices(self) -> dict[str, Choice]:
        """The choice of each matrix by its name."""
        return {name: self.problem.choices[column] for name, column in zip(self.names, self.columns, strict=True)}


def accounted(evidence: Evidence, request: Request) -> Evidence:
    """With the settings of rules, and per weight instead of per matrix where every matrix is to count once."""
    evidence = replace(evidence, gamma=request.config.gamma, seed=request.config.seed)
    if not request.config.unweighted:
        return evidence
    counts = evidence.weights
    return replace(
        evidence,
        errors=evidence.errors / counts[:, None],
        energies=evidence.energies / counts,
        weights=np.ones_like(counts),
    )


def losses_of(request: Request, evidence: Evidence) -> np.ndarray:
    """By the request's method, float64 [planned, choices]; what is not finite the solver refuses, by name."""
    assert request.method.rule is not None  # losses come from a rule
    with np.errstate(over="ignore", invalid="ignore"):
        return request.method.rule(evidence)


def solve(
    problem: Problem, request: Request, evidence: Evidence, joined: Sequence[str] = (), extra: np.ndarray | None = None
) -> Answer:
    """The best choices by the request's method. extra: losses [joined, choices] of matrices beside the planned ones."""
    kind, rule, per_layer = request.method.kind, request.method.rule, request.config.per_layer
    names = (*evidence.names, *joined)
    request.check_speed()
    if kind in RANKED:
        if per_layer:
            raise BudgetError(f"--per-layer needs losses, and {request.config.method} only has an order. Drop it.")
        scores = None if rule is None else rule(evidence)
        errors = evidence.errors if extra is None else np.vstack([evidence.errors, extra])
        return Answer(problem, names, RANKED[kind](problem, scores, errors), errors)
    losses = losses_of(request, evidence)
    if kind == "expert":
        experts = [f"layers.{matrix.layer}.experts.{matrix.expert}" for matrix in evidence.matrices]
        return Answer(problem, names, solve_experts(problem, losses, experts), losses)
    if extra is not None:
        losses = np.vstack([losses, extra])
    return Answer(problem, names, solve_losses(problem, losses, per_layer), losses)


def draft(request: Request, measurements: Measurements, evidence: Evidence, answer: Answer) -> Plan:
    """The plan, but for what only a checkpoint tells: its source, bytes, and what lies outside the budget."""
    config, solution, problem = request.config, answer.solution, answer.problem
    experts = answer.columns[: len(evidence.names)]
    picked = np.arange(len(experts)), experts
    bits = [code_bits(request.choices[column]) for column in experts]
    resolved = config.model_copy(update={"gamma": resolved_gamma(evidence)} if config.method == "alphaq" else {})
    bounded = np.isfinite(solution.lower_bound)
    single = (
        not config.per_layer and problem.times is None and request.method.kind == "loss"
    )  # one price for all: the budget is the only limit
    deviations, spectra, weights = measurements.deviations, measurements.spectra, measurements.evidence.weights
    known = measurements.evidence.relative_errors if measurements.plain is None else measurements.plain
    relative = known[picked].tolist()
    return Plan(
        alphaq_version=alphaq.__version__,
        engine=request.profile.name,
        source=None,
        config=resolved,
        average_bits=float(weights @ bits / int(weights.sum())),
        budget_unit=next(name for name, value in config.budget.model_dump().items() if value is not None),
        budget_slack=float(problem.limit - solution.cost),
        objective=solution.objective,
        lower_bound=solution.lower_bound if bounded else None,
        price=solution.price if bounded and single else None,
        histogram=dict(sorted(Counter(map(code_bits, answer.choices.values())).items())),
        assignment={name: code_bits(choice) for name, choice in answer.choices.items()},
        choices={name: str(choice) for name, choice in answer.choices.items()},
        alpha={name: one.alpha for name, one in spectra.items() if one.alpha is not None},
        unplanned=measurements.left_out,
        neutral={name: one.reason for name, one in spectra.items() if one.alpha is None},
        expected_error=named_errors(evidence.names, relative),
        sampling_error=None if deviations is None else float(f"{deviations[picked].max():.2g}"),
        table=_table(answer),
    )


def named_errors(names: Sequence[str], relative: Sequence[float]) -> dict[str, float]:
    """Relative errors by the matrix' name, as a plan has them."""
    return {name: float(f"{error:.4g}") for name, error in zip(names, relative, strict=True)}


def _table(answer: Answer) -> PlanTable:
    """Why the plan is as it is, unit by unit, for `alphaq explain` and reports."""
    problem = answer.problem
    totals = problem.per_unit(answer.losses)
    costs = problem.per_unit(problem.costs)
    kinds, kind = np.unique(costs, axis=0, return_inverse=True)
    members: dict[str, list[str]] = {}
    if len(problem.units) != len(answer.names):
        for number, name in zip(problem.owner, answer.names, strict=True):
            members.setdefault(problem.units[number], []).append(name)
    return PlanTable(
        choices=tuple(map(str, problem.choices)),
        losses={
            unit: tuple(float(f"{loss:.6g}") if may else None for loss, may in zip(row, mays, strict=True))
            for unit, row, mays in zip(problem.units, totals.tolist(), problem.unit_allowed.tolist(), strict=True)
        },
        costs=tuple(map(tuple, kinds.tolist())),
        cost_of=tuple(kind.reshape(-1).tolist()),
        members={unit: tuple(names) for unit, names in members.items()},
    )
