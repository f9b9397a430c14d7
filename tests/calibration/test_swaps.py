"""What tokens that change their expert add to the KL divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaq.calibration import swaps
from alphaq.calibration.backward import stream_scores
from alphaq.calibration.fisher import Fisher, MatrixFisher
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.sensitivity.nats import prediction
from conftest import COMMON, random_model
from dense_models import save_dense

IDS = random_windows(COMMON["vocab_size"], 8, 32)


def swap_costs(checkpoint: Checkpoint, ids: torch.Tensor) -> Mapping[int, float]:
    return stream_scores(checkpoint, ids, lambda seen: None).swaps


def test_every_routed_layer_has_a_cost_and_noise_does_not_change_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny)
    ids = random_windows(4096, 32, 64)
    found = {}
    for noise in (0.03, 0.06):
        monkeypatch.setattr(swaps, "NOISE", noise)
        found[noise] = swap_costs(checkpoint, ids)
        assert found[noise].keys() == {0, 1, 2, 3}
        assert all(cost > 0 for cost in found[noise].values())
    assert sum(found[0.06].values()) == pytest.approx(sum(found[0.03].values()), rel=0.5)  # KL alone: four times


def test_a_dense_model_swaps_nothing(tmp_path: Path) -> None:
    assert swap_costs(open_checkpoint(save_dense(tmp_path, "llama")), IDS) == {}


def test_where_all_experts_are_used_none_is_swapped(tmp_path: Path) -> None:
    model = random_model("mixtral", num_experts_per_tok=4, num_local_experts=4)
    model.save_pretrained(tmp_path)
    assert swap_costs(open_checkpoint(tmp_path), IDS) == {}


def test_only_what_comes_before_a_router_swaps_there() -> None:
    def matrix(name: str, role: Role, layer: int | None) -> MatrixRef:
        return MatrixRef(name, (8, 8), "BF16", layer, None, None, role, name)

    matrices = [
        matrix("embedding", Role.EMBEDDING, None),
        matrix("attention", Role.ATTENTION, 1),
        matrix("expert", Role.EXPERT, 1),
        matrix("head", Role.HEAD, None),
    ]
    flat = MatrixFisher(1.0, np.ones(8, np.float32), np.ones(8, np.float32), np.ones(4, np.float32))
    fisher = Fisher({one.name: flat for one in matrices}, swaps={0: 0.1, 1: 0.2})

    def predicted(name: str) -> float:
        return prediction(fisher, {name: 0.01}, matrices).kl

    assert predicted("embedding") == pytest.approx(0.01 + (0.1 + 0.2) * math.sqrt(0.01))
    assert predicted("attention") == pytest.approx(0.01 + 0.2 * math.sqrt(0.01))
    assert predicted("expert") == predicted("head") == pytest.approx(0.01)
