"""What is best: the problem solved, and the answer with its certificate and its reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import alphaq
from alphaq.allocation.bound import rate_distortion
from alphaq.allocation.problem import Problem, solve_experts, solve_losses, solve_order, solve_shares
from alphaq.allocation.solution import Solution
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.gguf.profile import gaussian_errors
from alphaq.errors import BudgetError
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Plan, PlanTable
from alphaq.planning.kept import kept_shares
from alphaq.planning.limits import byte_tables, coded_table, outside_experts, problem_of, size_bytes
from alphaq.planning.measured import Measurements
from alphaq.planning.request import Request
from alphaq.sensitivity.methods import Evidence, resolved_gamma
from alphaq.sensitivity.roles import role_weights


def make_plan(checkpoint: Checkpoint | None, request: Request, found: Measurements) -> Plan:
    """Solve the budget and describe the result.

    `found` may hold more choices than are asked for, which change nothing. Raises BudgetError if it lacks one, or
    nothing fits.
    """
    if found.by_shapes and not request.method.by_shapes:
        raise BudgetError(f"--method {request.config.method} needs the weights, which were not read. Measure for it.")
    found = found.of(request)
    config, choices = request.config, request.choices
    problem = problem_of(checkpoint, request, found.evidence)
    evidence = _accounted(replace(found.evidence, gamma=config.gamma, seed=config.seed), request)
    fixed, joined = ({}, []) if checkpoint is None else outside_experts(checkpoint, request)
    usual = gaussian_errors(choices) if joined else None
    others = np.array([found.joined.get(matrix.name, usual) for matrix in joined])
    solution, losses = _solve(problem, request, evidence, checkpoint, joined, others)

    columns = problem.chosen(solution.columns)
    names = (*evidence.names, *(matrix.name for matrix in joined))
    chosen = {name: choices[column] for name, column in zip(names, columns, strict=True)}
    experts = columns[: len(evidence.names)]
    parameters = int(found.weights.sum())
    allowed = problem.allowed[: len(experts)]
    picked = np.arange(len(experts)), experts
    blocks = None
    if checkpoint is not None:
        table = (
            byte_tables(request.profile, evidence.matrices, choices)[0] if evidence.coded is None else evidence.coded
        )
        blocks = int(table[picked].sum())
    size = None
    if checkpoint is not None:
        coded = evidence.coded is not None
        size = (
            evidence.rest_bytes + int(coded_table(evidence)[picked].sum())
            if coded
            else size_bytes(checkpoint, request, chosen)
        )
    relative = found.evidence.relative_errors[picked].tolist()
    if all(matrix.name in found.joined for matrix in joined):
        relative += [row[column] for row, column in zip(others, columns[len(experts) :], strict=True)]
    against_bound = None
    if checkpoint is not None and request.method.kind == "loss" and not config.unweighted:
        own = np.where(allowed, losses[: len(experts)], np.nan)
        against_bound = rate_distortion(choices, own, evidence.errors, evidence.energies, table, found.weights, experts)
    deviation = None if found.deviations is None else float(f"{found.deviations[picked].max():.2g}")
    resolved = config.model_copy(update={"gamma": resolved_gamma(evidence)} if config.method == "alphaq" else {})
    unit = next(name for name, value in config.budget.model_dump().items() if value is not None)
    bounded = np.isfinite(solution.lower_bound)
    single = not config.per_layer and request.method.kind == "loss"  # one price for all: the budget is the only limit
    return Plan(
        alphaq_version=alphaq.__version__,
        engine=request.profile.name,
        source=None if checkpoint is None else checkpoint.identity,
        config=resolved,
        average_bits=float(found.weights @ [choices[column].bits for column in experts] / parameters),
        bits_per_weight=None if blocks is None else 8 * blocks / parameters,
        size_bytes=size,
        budget_unit=unit,
        budget_slack=float(problem.limit - solution.cost),
        objective=solution.objective,
        lower_bound=solution.lower_bound if bounded else None,
        price=solution.price if bounded and single else None,
        histogram=dict(sorted(Counter(choice.bits for choice in chosen.values()).items())),
        assignment={name: choice.bits for name, choice in chosen.items()},
        choices={name: str(choice) for name, choice in (chosen | fixed).items()},
        alpha={name: s.alpha for name, s in found.spectra.items() if s.alpha is not None},
        unplanned=found.left_out,
        neutral={name: s.reason for name, s in found.spectra.items() if s.alpha is None},
        kept={} if checkpoint is None else kept_shares(checkpoint, chosen | fixed),
        expected_error={name: float(f"{error:.4g}") for name, error in zip(names, relative, strict=False)},
        sampling_error=deviation,
        rate_distortion=against_bound,
        table=_table(problem, losses, names),
    )


def _accounted(evidence: Evidence, request: Request) -> Evidence:
    """Per weight instead of per matrix where every matrix is to count once."""
    if not request.config.unweighted:
        return evidence
    counts = evidence.weights
    return replace(
        evidence,
        errors=evidence.errors / counts[:, None],
        energies=evidence.energies / counts,
        weights=np.ones_like(counts),
    )


def _solve(
    problem: Problem,
    request: Request,
    evidence: Evidence,
    checkpoint: Checkpoint | None,
    joined: Sequence[MatrixRef],
    relative: np.ndarray,
) -> tuple[Solution, np.ndarray]:
    """The solution and the losses [matrices, choices] that it is judged by; `joined`, whose relative errors are
    [joined, choices], come after the experts."""
    kind, rule = request.method.kind, request.method.rule
    per_layer = request.config.per_layer
    if kind in ("order", "ratio"):
        if per_layer:
            raise BudgetError(f"--per-layer needs losses, and {request.config.method} only has an order. Drop it.")
        scores = None if rule is None else rule(evidence)
        if kind == "ratio":
            assert scores is not None  # the table has a rule for it
            return solve_shares(problem, scores, evidence.errors), evidence.errors
        return solve_order(problem, scores, evidence.errors), evidence.errors
    assert rule is not None  # losses come from a rule
    with np.errstate(over="ignore", invalid="ignore"):  # the solver refuses what is not finite, by name
        losses = rule(evidence)
    if kind == "expert":
        experts = [f"layers.{matrix.layer}.experts.{matrix.expert}" for matrix in evidence.matrices]
        return solve_experts(problem, losses, experts), losses
    if joined:
        assert checkpoint is not None  # without one nothing joins
        tied = not checkpoint.with_role(Role.HEAD)
        weights = role_weights(joined, evidence.matrices, tied)
        losses = np.vstack([losses, weights[:, None] * relative])
    return solve_losses(problem, losses, per_layer), losses


def _table(problem: Problem, losses: np.ndarray, names: Sequence[str]) -> PlanTable:
    """Why the plan is as it is, unit by unit, for `alphaq explain` and reports."""
    totals = problem.per_unit(losses)
    costs = problem.per_unit(problem.costs)
    kinds, kind = np.unique(costs, axis=0, return_inverse=True)
    members: dict[str, list[str]] = {}
    if len(problem.units) != len(names):
        for number, name in zip(problem.owner, names, strict=True):
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
