"""What shapes alone say of a plan, before a weight is read or fetched: whether the budget holds, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError
from alphaq.planning.costs import spare_bytes
from alphaq.planning.dropping import fitting_scope
from alphaq.planning.limits import problem_of
from alphaq.planning.request import Request


@dataclass(frozen=True)
class Outline:
    """matrices and parameters: those that the budget decides on. source_bytes: of the model, of which planning reads
    at least planned_bytes. least_bytes and most_bytes: what the weight files can take at least, and at most under the
    budget (None where it does not count bytes)."""

    model: str
    engine: str
    method: str
    budget: str
    matrices: int
    parameters: int
    source_bytes: int
    planned_bytes: int
    least_bytes: int
    most_bytes: int | None


def outline(checkpoint: Checkpoint, request: Request) -> Outline:
    """Raises BudgetError, PlanError or ArchitectureError where planning or writing would for lack of room or place."""
    if request.config.codec is not None:
        raise BudgetError("What coded files take is only known when they have been coded. Drop --codec or --dry-run.")
    scope = fitting_scope(checkpoint, request)
    problem, matrices = problem_of(scope), scope.matrices
    whole = request.profile.writer.layout(checkpoint, {})
    cheapest = problem.chosen(problem.unit_costs.argmin(axis=1))
    chosen = {one.name: request.choices[column] for one, column in zip(matrices, cheapest, strict=True)}
    least = scope.size_bytes(chosen)
    room = problem.limit - int(problem.unit_costs.min(axis=1).sum()) + spare_bytes(scope, whole, whole.size_bytes)
    return Outline(
        model=checkpoint.name,
        engine=request.profile.name,
        method=request.config.method,
        budget=str(request.config.budget),
        matrices=len(matrices),
        parameters=sum(matrix.parameters for matrix in matrices),
        source_bytes=checkpoint.nbytes,
        planned_bytes=sum(checkpoint.stored_bytes(matrix) for matrix in matrices),
        least_bytes=least,
        most_bytes=None if request.config.unweighted else least + room,
    )
