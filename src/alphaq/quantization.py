"""The stage between a plan and files: a stream of quantized matrices, one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PlanError
from alphaq.numerics import squared_norm
from alphaq.quantizers.base import QUANTIZERS, Quantizer, sixteen_bits
from alphaq.quantizers.packing import dequantize
from alphaq.records import Choice, Plan, QuantizedMatrix, Role


@dataclass(frozen=True)
class StoredTensor:
    """One output tensor: a quantized matrix with its relative squared error, or values kept as they are."""

    name: str
    content: QuantizedMatrix | torch.Tensor
    relative_error: float | None = None


def plan_choices(plan: Plan, checkpoint: Checkpoint) -> dict[str, Choice]:
    """The plan's choices, checked against the checkpoint it is to be used on.

    Raises PlanError if it was made for other weights, names a matrix that is not there, or leaves an
    expert out.
    """
    if plan.source is not None and plan.source.fingerprint != checkpoint.fingerprint:
        raise PlanError(
            f"The plan was made for {plan.source.name!r} with other weight files than {checkpoint.name!r}. "
            "Make a new plan for this checkpoint."
        )
    known = {matrix.name for matrix in checkpoint.matrices}
    choices = {name: plan.choice(name) for name in plan.choices}
    for name in choices:
        if name not in known:
            raise PlanError(f"The plan names {name!r}, which {checkpoint.name} does not have. Make a new plan for it.")
    forgotten = [matrix.name for matrix in checkpoint.with_role(Role.EXPERT) if matrix.name not in choices]
    if forgotten:
        raise PlanError(
            f"The plan leaves out {len(forgotten)} expert matrices, first {forgotten[0]!r}. "
            "Give each a choice; '16' keeps a matrix as it is."
        )
    return choices


def relative_squared_error(weight: torch.Tensor, restored: torch.Tensor) -> float:
    """Σ(w − ŵ)² / Σw², 0 for a matrix of zeros that is restored exactly."""
    error, energy = squared_norm(restored.float() - weight.float()), squared_norm(weight)
    return error / energy if energy else error


def quantized_tensors(
    checkpoint: Checkpoint, choices: Mapping[str, Choice], shard: str, quantizer: str = "rtn"
) -> Iterator[StoredTensor]:
    """Every tensor that one source shard becomes, in file order; fused tensors come apart."""
    quantize: Quantizer = QUANTIZERS[quantizer]
    within = checkpoint.matrices_by_tensor(choices)
    for stored in checkpoint.shards[shard]:
        if stored not in within:
            yield StoredTensor(stored, checkpoint.tensor(stored))
        for matrix in within.get(stored, ()):
            weight, choice = checkpoint.read(matrix), choices[matrix.name]
            if choice.bits == 16:
                kept = sixteen_bits(weight)
                yield StoredTensor(matrix.name, kept, relative_squared_error(weight, kept))
            else:
                found = quantize(weight, choice, matrix.name)
                yield StoredTensor(matrix.name, found, relative_squared_error(weight, dequantize(found)))
