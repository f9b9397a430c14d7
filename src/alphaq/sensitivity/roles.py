"""How much the matrices outside the experts weigh, where one budget is to cover them too.

Rounding one role at a time, to several types, moved the output of both trained models in these proportions: the
divergence of a role over that of all routed experts together, at the same relative error. They hardly differed between
a model of 32 experts and one of 96, so they are taken as the shares of a whole model: a role's share is spread over its
matrices. Measurements: docs/research/log.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphaq.nouns.matrix import MatrixRef, Role

EXPERTS = 1.0
ROLE_SHARES = {Role.SHARED_EXPERT: 0.28, Role.EMBEDDING: 1.0, Role.HEAD: 2.6}
ATTENTION_SHARES = {"q_proj": 0.17, "k_proj": 0.24, "v_proj": 0.39, "o_proj": 0.27}
OTHER_ATTENTION_SHARE = 0.27  # of a projection that only some families have


def role_weights(matrices: Sequence[MatrixRef], experts: Sequence[MatrixRef], tied: bool = False) -> np.ndarray:
    """Loss per unit of relative error of each matrix, float64 [matrices], where that of all experts is their weights.

    What mixes tokens in another way than attention was not measured, and counts as attention that only some families
    have. A dense MLP counts as much as the experts of one layer, with their shared one; a tied embedding as both that
    it is.
    """
    total = sum(matrix.parameters for matrix in experts)
    layers = len({matrix.layer for matrix in experts})
    dense = (EXPERTS + ROLE_SHARES[Role.SHARED_EXPERT]) / layers
    shares: list[float] = []
    groups: list[tuple[Role, object]] = []
    for matrix in matrices:
        if matrix.role in (Role.ATTENTION, Role.MIXER):
            shares.append(ATTENTION_SHARES.get(matrix.projection or "", OTHER_ATTENTION_SHARE))
            groups.append((matrix.role, matrix.projection))
        elif matrix.role is Role.DENSE_MLP:
            shares.append(dense)
            groups.append((matrix.role, matrix.layer))
        else:
            both = tied and matrix.role is Role.EMBEDDING
            shares.append(ROLE_SHARES[matrix.role] + both * ROLE_SHARES[Role.HEAD])
            groups.append((matrix.role, None))
    sizes = {group: 0 for group in groups}
    for group, matrix in zip(groups, matrices, strict=True):
        sizes[group] += matrix.parameters
    return np.array(
        [
            total * share * matrix.parameters / sizes[group]
            for matrix, share, group in zip(matrices, shares, groups, strict=True)
        ]
    )
