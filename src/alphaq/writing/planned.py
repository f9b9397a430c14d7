"""A plan held against the checkpoint that it is to be carried out on, before any work."""

from __future__ import annotations

from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.profiles import profile
from alphaq.errors import PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan

OWN = "self"
"""Name of an importance matrix that a model's own writing made."""
LOSSES, INPUTS = "losses", "inputs"
"""The two ways of making one, with which their digests begin."""


def as_planned(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint without the experts that the plan does without.

    Raises PlanError if it lacks one of them, or the engine has one count for all layers and the plan has not.
    """
    if plan.dropped is None or checkpoint.dropped:
        return checkpoint
    return without_experts(checkpoint, plan.dropped.experts, profile(plan.engine).uneven)


def plan_choices(plan: Plan, checkpoint: Checkpoint) -> dict[str, Choice]:
    """The plan's choices, checked against the checkpoint it is to be used on.

    Raises PlanError if it was made for other weights, names a matrix that is not there, or leaves one out.
    """
    if plan.dropped is not None and plan.dropped.experts and not checkpoint.dropped:
        raise PlanError(
            f"The plan does without {plan.dropped.count} experts of {checkpoint.name}, which cannot be done here. Plan "
            "without --drop, or start from a model that `alphaq prune` wrote."
        )
    if plan.source is not None and plan.source.fingerprint != checkpoint.fingerprint:
        raise PlanError(
            f"The plan was made for {plan.source.name!r} with other weight files than {checkpoint.name!r}. "
            "Make a new plan for this checkpoint."
        )
    known = {matrix.name for matrix in checkpoint.matrices}
    choices = plan.every_choice()
    for name in choices:
        if name not in known:
            raise PlanError(f"The plan names {name!r}, which {checkpoint.name} does not have. Make a new plan for it.")
    forgotten = [matrix.name for matrix in checkpoint.planned if matrix.name not in choices]
    if forgotten:
        raise PlanError(
            f"The plan leaves out {len(forgotten)} matrices, first {forgotten[0]!r}. "
            "Give each a choice; '16' keeps a matrix as it is."
        )
    return choices


def check_source(checkpoint: Checkpoint, engine: str) -> None:
    """Raise PlanError if the engine's files need what the source lacks, or cannot hold what it has."""
    profile(engine).check_layers(checkpoint)
    if checkpoint.gguf is not None and not profile(engine).writer.from_gguf:
        raise PlanError(
            f"{checkpoint.name} is a GGUF file, whose tokenizer and config only --engine llama.cpp carries over. Start "
            f"from the Hugging Face folder for {engine}."
        )


def check_importance(plan: Plan, imatrix: ImportanceMatrix | None) -> None:
    """Raise PlanError unless this is the importance matrix that the plan was made with."""
    planned, given = plan.imatrix or "", f"{imatrix.name} {imatrix.digest}" if imatrix else ""
    told = plan.config is not None or imatrix is not None
    if told and planned.rpartition(" ")[2] != given.rpartition(" ")[2]:
        raise PlanError(
            f"The plan was made with the importance matrix {planned or 'of ones'}, not with {given or 'one of ones'}. "
            f"{_remedy(planned.rpartition(' ')[0], given.rpartition(' ')[0])}"
        )


def _remedy(planned: str, given: str) -> str:
    """What a user may do. planned, given: names of importance matrices, empty for ones."""
    if planned == given == OWN:
        return (
            "A model's own may come out otherwise on another machine or by another version. Make the plan again here, "
            "or make plans that are to go elsewhere with a file of `alphaq imatrix`."
        )
    if planned == OWN:
        return "Give --imatrix self, or make the plan again."
    return f"{'Give --imatrix the same file' if planned else 'Drop --imatrix'}, or make the plan again."


def check_size(plan: Plan, size_bytes: int) -> None:
    """Raise PlanError unless the files take what the plan promises."""
    if plan.size_bytes not in (None, size_bytes):
        raise PlanError(
            f"The plan promises {plan.size_bytes} bytes but its choices take {size_bytes}. Make the plan again."
        )
