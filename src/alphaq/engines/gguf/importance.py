"""What an importance matrix says of each matrix of a checkpoint, whatever tool wrote it and of whichever file.

Entries go by GGUF tensor. Matrices that read the same input have the same importance, so an entry of one speaks for
all of them: gate for up, where a fused operation hid one; `ffn_gate_up_exps` of a file whose stacks are merged.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.gguf.model import TensorRecipe, gguf_tensors
from alphaq.engines.importance import Importance
from alphaq.errors import CheckpointError
from alphaq.nouns.matrix import Role

# Kinds of tensors of one layer, as GGUF calls them, that multiply one and the same input. Merged ones come last.
_ONE_INPUT = (
    ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
    ("ffn_gate", "ffn_up"),
    ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    ("attn_q_a", "attn_kv_a_mqa", "attn_q"),
)
_SELDOM_THERE = (Role.EMBEDDING, Role.HEAD)
"""llama-imatrix sees no inputs of the embedding, and leaves out the head's unless it is asked for it."""


def importance_of(checkpoint: Checkpoint, given: ImportanceMatrix) -> Importance:
    """Importance of the columns of each matrix. Matrices without an entry are left out, and count their columns alike.

    Raises CheckpointError if it is of another model: an entry of another size, or none for what a plan is about.
    """
    found: dict[str, np.ndarray] = {}
    missing: dict[str, Role] = {}
    by_head: list[str] = []
    for recipe in gguf_tensors(checkpoint):
        if not recipe.matrices:
            continue
        if len(recipe.shape) == 3 and not recipe.is_stack:
            if recipe.name in given.tensors and recipe.type != "F32" and not recipe.transform:
                by_head.append(recipe.name)
            continue
        entry = next((name for name in _entries(recipe.name) if name in given.tensors), None)
        if entry is not None:
            columns = _columns(recipe, entry, given, checkpoint)
            found.update(zip((matrix.name for matrix in recipe.matrices), columns, strict=True))
        elif recipe.type != "F32" and recipe.matrices[0].role not in _SELDOM_THERE:
            missing[recipe.name] = recipe.matrices[0].role
    if not any(matrix.name in found for matrix in checkpoint.planned):
        raise CheckpointError(
            f"{given.name} has no entry for any {checkpoint.planned_role.value} matrix of {checkpoint.name}; its first "
            f"is {next(iter(given.tensors))}. Use an importance matrix of this model."
        )
    first = sorted(missing, key=lambda name: missing[name] is not checkpoint.planned_role)
    return Importance(found, tuple(first), tuple(by_head))


def _entries(name: str) -> Iterator[str]:
    """Names of entries that speak for a tensor, its own first."""
    yield name
    layer, dot, kind = name.removesuffix(".weight").rpartition(".")
    for kinds in _ONE_INPUT:
        if kind in kinds:
            yield from (f"{layer}{dot}{other}.weight" for other in kinds if other != kind)


def _columns(recipe: TensorRecipe, entry: str, given: ImportanceMatrix, checkpoint: Checkpoint) -> np.ndarray:
    """Importance [matrices, columns] of a tensor's matrices."""
    rows, count = given.tensors[entry], len(recipe.matrices)
    gone = checkpoint.dropped.get(recipe.matrices[0].layer or 0, ()) if recipe.is_stack else ()
    if gone and rows.size == (count + len(gone)) * recipe.shape[-1]:  # it is of the model with all experts
        rows = np.delete(rows.reshape(count + len(gone), -1), gone, axis=0)
    # The older format has all experts' columns in one row.
    columns = rows.reshape(count, -1) if rows.size % count == 0 else rows
    if columns.shape != (count, recipe.shape[-1]):
        raise CheckpointError(
            f"{given.name}: {entry} has {rows.size} values, not {recipe.shape[-1]} for each of {count} matrices. "
            "Use the importance matrix of this model."
        )
    # Of experts in one row the mean is 1 over all of them, and one that was never hit is at the floor.
    return columns if columns.shape == rows.shape else columns / columns.mean(axis=1, keepdims=True)
