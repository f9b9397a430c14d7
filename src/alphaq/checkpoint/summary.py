"""What `alphaq inspect` shows of a checkpoint: counts, parameters and bytes by role."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from alphaq.checkpoint.families.routing import own_counts
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.tensors import TensorInfo, bytes_on_disk, stored_dtype
from alphaq.nouns.matrix import Role


@dataclass(frozen=True)
class RoleCounts:
    """Of the tensors with one role; matrices: those that could be planned or have a role of their own."""

    tensors: int
    matrices: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """experts_per_layer: the most of any layer. expert_shapes: [rows, columns] by projection. dtypes: as stored. bytes:
    of all tensors on disk."""

    model: str
    architecture: str
    layers: int
    experts_per_layer: int
    fewest_experts_per_layer: int
    expert_matrices: int
    expert_shapes: dict[str, list[int]]
    dtypes: list[str]
    parameters: int
    bytes: int
    shards: int
    roles: dict[str, RoleCounts]


def summarize(checkpoint: Checkpoint) -> Summary:
    """Count what a checkpoint holds."""
    matrices = Counter(matrix.role for matrix in checkpoint.matrices)
    by_role: dict[Role, list[TensorInfo]] = {}
    for tensors in checkpoint.shards.values():
        for name, info in tensors.items():
            by_role.setdefault(checkpoint.roles[name], []).append(info)
    roles = {
        role.value: RoleCounts(
            len(infos),
            matrices[role],
            sum(math.prod(info.shape) for info in infos),
            sum(map(bytes_on_disk, infos)),
        )
        for role, infos in by_role.items()
    }
    experts = checkpoint.with_role(Role.EXPERT)
    most = checkpoint.architecture.experts_per_layer(checkpoint.config)
    return Summary(
        model=checkpoint.name,
        architecture=checkpoint.architecture.name,
        layers=checkpoint.architecture.layers(checkpoint.config),
        experts_per_layer=most,
        fewest_experts_per_layer=min([most, *own_counts(checkpoint.architecture, checkpoint.config).values()]),
        expert_matrices=len(experts),
        expert_shapes={str(matrix.projection): list(matrix.shape) for matrix in experts},
        dtypes=sorted({stored_dtype(info) for infos in by_role.values() for info in infos}),
        parameters=sum(role.parameters for role in roles.values()),
        bytes=checkpoint.nbytes,
        shards=len(checkpoint.shards),
        roles=dict(sorted(roles.items())),
    )
