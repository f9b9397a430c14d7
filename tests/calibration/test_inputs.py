"""What is shown as a matrix's inputs is what the model multiplies it with, and what is returned is what it uses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alphaq.calibration.inputs import Inputs, stream_inputs
from alphaq.calibration.stream import stream_forward
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.nouns.matrix import Role
from conftest import COMMON, FAMILIES
from families import random_family, save_layout

IDS = random_windows(COMMON["vocab_size"], windows=3, length=24)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_shown_its_inputs_once(save_family: Callable[..., Path], family: str) -> None:
    checkpoint = open_checkpoint(save_family(family, False))
    seen: dict[str, Inputs] = {}

    def visit(inputs: Inputs) -> list[torch.Tensor]:
        for matrix in inputs.matrices:
            assert matrix.name not in seen
            assert inputs.values.shape[1] == matrix.shape[1]
            seen[matrix.name] = inputs
        return [checkpoint.read(matrix).float() for matrix in inputs.matrices]

    stream_inputs(checkpoint, IDS, visit)
    roles = (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.DENSE_MLP)
    assert {matrix.name for matrix in checkpoint.matrices if matrix.role in roles} <= seen.keys()
    outside = [inputs for inputs in seen.values() if inputs.weights is None]
    assert all(len(inputs.values) == IDS.numel() for inputs in outside)
    layer = next(matrix.layer for matrix in checkpoint.planned)
    ups = [m for m in checkpoint.planned if m.layer == layer and m.projection in ("up", "gate_up")]
    chosen = checkpoint.text_config["num_experts_per_tok"]
    assert sum(len(seen[matrix.name].values) for matrix in ups) == IDS.numel() * chosen


def test_inputs_of_experts_are_those_of_the_plain_pass(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral", False))
    traffic = {}
    expected = stream_forward(checkpoint, IDS, lambda one: traffic.update({one.layer: one}))
    seen = {}

    def visit(inputs: Inputs) -> list[torch.Tensor]:
        seen.update({matrix.name: inputs for matrix in inputs.matrices})
        return [checkpoint.read(matrix).float() for matrix in inputs.matrices]

    stream_inputs(checkpoint, IDS, visit)
    assert expected.isfinite().all()
    for matrix in checkpoint.planned:
        if matrix.projection == "gate":
            token, slot = torch.where(traffic[matrix.layer].experts == matrix.expert)
            torch.testing.assert_close(seen[matrix.name].values, traffic[matrix.layer].inputs[token])
            torch.testing.assert_close(seen[matrix.name].weights, traffic[matrix.layer].weights[token, slot])


def test_what_is_returned_takes_the_place_of_the_matrix(save_family: Callable[..., Path]) -> None:
    """With zeros for every value projection, what attention puts out is nothing."""
    checkpoint = open_checkpoint(save_family("mixtral", False))
    outputs = {}

    def visit(inputs: Inputs) -> list[torch.Tensor]:
        weights = [checkpoint.read(matrix).float() for matrix in inputs.matrices]
        if inputs.matrices[0].name.endswith("o_proj.weight"):
            outputs[inputs.matrices[0].name] = inputs.values
        return [w * 0 if m.name.endswith("v_proj.weight") else w for m, w in zip(inputs.matrices, weights, strict=True)]

    stream_inputs(checkpoint, IDS, visit)
    assert outputs
    assert not any(values.any() for values in outputs.values())


def test_second_moments_weigh_tokens_by_their_routing() -> None:
    values, weights = torch.randn(50, 8), torch.rand(50)
    expected = torch.einsum("t,ti,tj->ij", weights.square(), values, values) / 50
    torch.testing.assert_close(Inputs((), values, weights).second_moments(), expected)
    torch.testing.assert_close(Inputs((), values).second_moments(), values.T @ values / 50)


def test_layers_made_of_several_matrices_are_replaced_whole(tmp_path: Path) -> None:
    """MiniMax-M3 stores gate and up of its shared experts, which its class computes in one product."""
    checkpoint = open_checkpoint(save_layout(random_family("minimax_m3_vl"), tmp_path / "model", True))
    together: set[str] = set()
    after: list[torch.Tensor] = []

    def visit(inputs: Inputs) -> list[torch.Tensor]:
        weights = [checkpoint.read(matrix).float() for matrix in inputs.matrices]
        if inputs.matrices[0].role is not Role.SHARED_EXPERT:
            return weights
        if len(weights) == 1:
            after.append(inputs.values)
            return weights
        together.update(matrix.name for matrix in inputs.matrices)
        return [weight * 0 for weight in weights]

    stream_inputs(checkpoint, IDS % checkpoint.text_config["vocab_size"], visit)
    assert together and after
    assert not any(values.any() for values in after)
