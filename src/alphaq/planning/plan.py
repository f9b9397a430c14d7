"""What is best: the problem solved, and the answer with its certificate and its reasons."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from alphaq.allocation.bound import rate_distortion
from alphaq.allocation.problem import RANKED
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError
from alphaq.formats.gaussian import gaussian_errors
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan, Prediction, RateDistortion
from alphaq.planning import stats
from alphaq.planning.costs import coded_table, data_table
from alphaq.planning.kept import kept_shares
from alphaq.planning.limits import problem_of
from alphaq.planning.measured import Measurements
from alphaq.planning.reading import Reading, known_uses
from alphaq.planning.request import Request
from alphaq.planning.scope import Scope
from alphaq.planning.solving import Answer, accounted, draft, named_errors, solve
from alphaq.sensitivity import nats
from alphaq.sensitivity.base import Evidence
from alphaq.sensitivity.roles import role_weights


def make_plan(checkpoint: Checkpoint | None, request: Request, measurements: Measurements) -> Plan:
    """Solve the budget and describe the result.

    `measurements` may hold more choices than are asked for, which change nothing. Raises BudgetError if it lacks one,
    or nothing fits.
    """
    if measurements.by_shapes and not request.method.by_shapes:
        raise BudgetError(f"--method {request.config.method} needs the weights, which were not read. Measure for it.")
    measurements = measurements.of(request)
    if checkpoint is None:
        return stats.make_plan(request, measurements)
    scope = Scope.of(checkpoint, request)
    answer, evidence = solved(scope, measurements)
    plan = draft(request, measurements, evidence, answer)
    chosen = {**answer.choices, **scope.fixed}
    blocks = data_table(scope, evidence)[: len(scope.planned)]
    weights = measurements.evidence.weights
    spent = int(blocks[_picked(scope, answer)].sum())
    return plan.model_copy(
        update={
            "source": checkpoint.identity,
            "bits_per_weight": 8 * spent / int(weights.sum()),
            **_bytes(scope, evidence, answer),
            "choices": {name: str(choice) for name, choice in chosen.items()},
            "kept": kept_shares(checkpoint, chosen),
            "expected_error": plan.expected_error | _joined_expected(scope, measurements, answer),
            "unpredicted": measurements.unpredicted,
            "prediction": _prediction(scope, measurements, answer),
            "rate_distortion": _against_bound(scope, evidence, answer, blocks, weights),
        }
    )


def solved(scope: Scope, measurements: Measurements) -> tuple[Answer, Evidence]:
    """The best choices by what was measured, and the evidence as the method accounts it. Raises BudgetError."""
    request = scope.request
    problem = problem_of(scope, measurements.evidence)
    evidence, joined_losses = weighed(scope, measurements)
    return solve(problem, request, evidence, [matrix.name for matrix in scope.joined], joined_losses), evidence


def weighed(scope: Scope, measurements: Measurements) -> tuple[Evidence, np.ndarray | None]:
    """The evidence as the method accounts it, and losses [joined, choices] of matrices beside the planned ones."""
    evidence = accounted(measurements.evidence, scope.request)
    if not scope.joined:
        return evidence, None
    return evidence, _joined_losses(scope, evidence, _joined_errors(scope, measurements), measurements.harms)


def _picked(scope: Scope, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of what the planned matrices take."""
    count = len(scope.planned)
    return np.arange(count), answer.columns[:count]


def _joined_errors(scope: Scope, measurements: Measurements) -> np.ndarray:
    """Relative errors [joined, choices], from a formula where they were not measured."""
    usual = gaussian_errors(scope.request.choices) if scope.joined else None
    return np.array([measurements.joined.get(matrix.name, usual) for matrix in scope.joined])


def _joined_losses(scope: Scope, evidence: Evidence, relative: np.ndarray, harms: Mapping[str, float]) -> np.ndarray:
    """Losses [joined, choices] in the unit of the experts'. harms: nats per unit of relative error, where known."""
    if scope.request.method.kind in RANKED:  # which are errors
        weights = np.array([matrix.parameters for matrix in scope.joined])
        return float(evidence.energies.sum() / evidence.weights.sum()) * weights[:, None] * relative
    measured = bool(harms) and scope.request.config.noise == "measured"
    if measured:
        return np.array([harms[matrix.name] for matrix in scope.joined])[:, None] * relative
    tied = not scope.checkpoint.with_role(Role.HEAD)
    unit = 1.0 if evidence.harms is None else float(evidence.harms.sum() / evidence.weights.sum())
    return unit * role_weights(scope.joined, evidence.matrices, tied)[:, None] * relative


def _joined_expected(scope: Scope, measurements: Measurements, answer: Answer) -> dict[str, float]:
    """The relative error of each joined matrix at its choice, where all of them were measured."""
    names = [matrix.name for matrix in scope.joined]
    known = measurements.joined_plain or measurements.joined
    if not known.keys() >= set(names):
        return {}
    columns = answer.columns[len(scope.planned) :]
    return named_errors(names, [known[name][at] for name, at in zip(names, columns, strict=True)])


def _prediction(scope: Scope, measurements: Measurements, answer: Answer) -> Prediction | None:
    """The KL that the plan is expected to have; None where losses are not nats, or not of all that is quantized."""
    fisher, fixed = measurements.evidence.fisher, measurements.fixed
    quantized = {name: choice for name, choice in scope.fixed.items() if not choice.kept}
    in_nats = scope.request.method.needs_fisher and scope.request.config.noise == "measured"
    if fisher is None or not in_nats or {name: one.choice for name, one in fixed.items()} != quantized:
        return None
    losses = answer.losses[np.arange(len(answer.names)), answer.columns]
    known = dict(zip(answer.names, losses.tolist(), strict=True))
    outside = {name: measurements.harms[name] * one.error for name, one in fixed.items()}
    return nats.prediction(fisher, known | outside, scope.checkpoint.matrices, measurements.dropped)


def _bytes(scope: Scope, evidence: Evidence, answer: Answer) -> dict[str, object]:
    """Bytes of all weight files, and what a token reads where they are not coded."""
    if evidence.coded is not None:
        return {"size_bytes": evidence.rest_bytes + int(coded_table(evidence)[_picked(scope, answer)].sum())}
    layout = scope.layout(answer.choices)
    reads = Reading.of(scope.checkpoint, known_uses(scope, evidence)).reads(layout)
    return {"size_bytes": layout.size_bytes, "read_bytes": reads.total, "reads": reads}


def _against_bound(
    scope: Scope, evidence: Evidence, answer: Answer, blocks: np.ndarray, weights: np.ndarray
) -> RateDistortion | None:
    """The answer beside what any quantizer could do; None where losses are not of errors. blocks: data bytes."""
    request, count = scope.request, len(scope.planned)
    if request.method.kind != "loss" or request.config.unweighted:
        return None
    losses = np.where(answer.problem.allowed[:count], answer.losses[:count], np.nan)
    columns = answer.columns[:count]
    return rate_distortion(request.choices, losses, evidence.errors, evidence.energies, blocks, weights, columns)
