"""What an engine with programs of its own is not given: families and plans that it could not load."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.assumptions.tables import engine_table
from alphaq.engines.safetensors.modules import KEPT
from alphaq.engines.settings import require_assumptions
from alphaq.errors import PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef


def require_family(checkpoint: Checkpoint, engine: str, title: str) -> None:
    """Raise PlanError unless the engine computes such models, and it is known what it calls their tensors.

    Raises ArchitectureError for a setting of a model without experts that the engine computes otherwise.
    """
    table = engine_table(engine)
    if checkpoint.architecture.name in table.families:
        return
    dense, family = table.dense, str(checkpoint.config.get("model_type"))
    if family in dense:
        require_assumptions(checkpoint, title, family, dense[family])
        return
    name = checkpoint.architecture.name if checkpoint.architecture.num_experts_keys else family
    if why := table.refused.get(name):
        raise PlanError(f"{title} has {name!r}, but {why}. Plan with --engine native.")
    raise PlanError(
        f"The {title} export does not know how {title} names the tensors of {name!r}. "
        f"Available: {', '.join((*table.families, *dense))}. Plan with --engine native."
    )


def require_agreement(
    checkpoint: Checkpoint, choices: Mapping[str, Choice], engine: str, unit_of: Callable[[MatrixRef], str]
) -> None:
    """Raise PlanError if two matrices that the engine holds as one unit have different choices."""
    first: dict[str, tuple[str, Choice]] = {}
    for matrix in checkpoint.matrices:
        choice = choices.get(matrix.name, KEPT)
        other, before = first.setdefault(unit_of(matrix), (matrix.name, choice))
        if before != choice:
            raise PlanError(
                f"{engine} runs {other} and {matrix.name} as one, but the plan stores them as {before} and "
                f"{choice}. Give them one choice, for example with --pin '{matrix.name}={before}'."
            )


def require_quantizable(
    checkpoint: Checkpoint,
    choices: Mapping[str, Choice],
    engine: str,
    keeps: Callable[[Checkpoint, MatrixRef], str | None],
) -> None:
    """Raise PlanError for a matrix that is quantized and that the engine must have in 16 bits."""
    for matrix in checkpoint.matrices:
        if choices.get(matrix.name, KEPT) != KEPT and (why := keeps(checkpoint, matrix)):
            raise PlanError(
                f"{engine} cannot have {matrix.name} quantized: {why}. Keep it with --pin '{matrix.in_every_layer}=16'."
            )
