from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.gguf.profile import ROLE_BITS
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.sensitivity.roles import (
    ATTENTION_SHARES,
    EXPERTS,
    OTHER_ATTENTION_SHARE,
    ROLE_SHARES,
    role_weights,
)


def weights_of(checkpoint: Checkpoint, matrices: list[MatrixRef]) -> dict[str, float]:
    """Weight of each matrix by name, as a share of that of all experts."""
    experts = checkpoint.with_role(Role.EXPERT)
    found = role_weights(matrices, experts) / sum(matrix.parameters for matrix in experts)
    return {matrix.name: float(weight) for matrix, weight in zip(matrices, found, strict=True)}


def others(checkpoint: Checkpoint) -> list[MatrixRef]:
    return [matrix for matrix in checkpoint.matrices if matrix.role in ROLE_BITS]


def test_matrices_of_a_role_share_what_the_role_weighs(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    found = weights_of(checkpoint, others(checkpoint))
    for role, share in ROLE_SHARES.items():
        its = [found[matrix.name] for matrix in checkpoint.with_role(role)]
        assert sum(its) == pytest.approx(share)
        assert np.ptp(its) == pytest.approx(0)  # they are of one size
    for projection, share in ATTENTION_SHARES.items():
        assert sum(weight for name, weight in found.items() if projection in name) == pytest.approx(share)
    assert set(found) == {matrix.name for matrix in others(checkpoint)}


def test_weight_is_in_proportion_to_size_within_a_role(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    first, second, *_ = checkpoint.with_role(Role.SHARED_EXPERT)
    found = weights_of(checkpoint, [replace(first, shape=(3 * first.shape[0], first.shape[1])), second])
    assert found[first.name] == pytest.approx(3 * found[second.name])


def test_a_dense_layer_weighs_as_much_as_a_layer_of_experts(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("deepseek_v3"))  # layer 0 of 3 is dense
    found = weights_of(checkpoint, others(checkpoint))
    dense = sum(found[matrix.name] for matrix in checkpoint.with_role(Role.DENSE_MLP))
    assert dense == pytest.approx((EXPERTS + ROLE_SHARES[Role.SHARED_EXPERT]) / 2)
    latent = [matrix for matrix in checkpoint.with_role(Role.ATTENTION) if matrix.projection == "kv_a_proj_with_mqa"]
    assert sum(found[matrix.name] for matrix in latent) == pytest.approx(OTHER_ATTENTION_SHARE)


def test_weights_do_not_depend_on_the_order_of_the_matrices(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    assert weights_of(checkpoint, others(checkpoint)[::-1]) == weights_of(checkpoint, others(checkpoint))
