import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_checkpoint import biased_to_first_two, changed

from alphaq.calibration.tokens import random_windows
from alphaq.calibration.traffic import Calibration, ExpertUse, curvature, expert_uses, gather, squared_row_ranges
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import ChoiceError, StatsError
from alphaq.formats.blocks import dequantize
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.quantizers.base import rounder_of
from alphaq.simd import sums as numerics
from conftest import COMMON, EXPERTS, FAMILIES

IDS = random_windows(COMMON["vocab_size"], windows=3, length=24)
TOKENS = IDS.numel()
KEPT, TWO, THREE, FOUR = Choice(16), Choice(2, 32), Choice(3, 32), Choice(4, 32)


def layer_outputs(model: Any, layer: int, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Arguments and output of a loaded model's experts module."""
    found: list[tuple[torch.Tensor, ...]] = []
    module = model.model.layers[layer].mlp.experts
    handle = module.register_forward_hook(lambda _, args, output: found.append((*args, output)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def matrix_of(checkpoint: Checkpoint, layer: int, expert: int, projection: str) -> MatrixRef:
    wanted = (layer, expert, projection)
    return next(m for m in checkpoint.with_role(Role.EXPERT) if (m.layer, m.expert, m.projection) == wanted)


def set_matrix(model: Any, matrix: MatrixRef, weight: torch.Tensor) -> None:
    experts = model.model.layers[matrix.layer].mlp.experts
    rows = matrix.shape[0]
    with torch.no_grad():
        if matrix.projection == "down":
            experts.down_proj[matrix.expert] = weight
        else:
            first = 0 if matrix.projection == "gate" else rows
            experts.gate_up_proj[matrix.expert, first : first + rows] = weight


def rounded(checkpoint: Checkpoint, matrix: MatrixRef, choice: Choice) -> torch.Tensor:
    return dequantize(rounder_of("debiased")(checkpoint.read(matrix), choice))


@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_of_a_layer_sum_to_one(save_family: Callable[..., Path], family: str) -> None:
    found = gather(open_checkpoint(save_family(family)), IDS)
    layers = {layer for layer, _ in found.experts}
    for layer in layers:
        uses = [found.experts[layer, expert] for expert in range(EXPERTS)]
        assert math.isclose(sum(use.frequency for use in uses), 1)
        assert sum(use.tokens for use in uses) == TOKENS * COMMON["num_experts_per_tok"]
    assert len(found.matrices) == 3 * len(found.experts)
    assert found.block_errors.keys() == found.experts.keys()


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_output_error_equals_that_of_the_loaded_model(
    save_family: Callable[..., Path], family: str, projection: str
) -> None:
    checkpoint = open_checkpoint(save_family(family))
    matrix = matrix_of(checkpoint, 2, 1, projection)
    model = load(checkpoint.folder)
    exact = layer_outputs(model, 2, IDS)[0][-1]
    set_matrix(model, matrix, rounded(checkpoint, matrix, TWO))
    # Only this expert moved, so the layer's difference is its weighted error.
    expected = float((layer_outputs(model, 2, IDS)[0][-1] - exact).square().sum()) / TOKENS
    assert expected > 0
    found = gather(checkpoint, IDS, (TWO,))
    assert found.matrices[matrix.name].output_errors[TWO] == pytest.approx(expected, rel=1e-3)


def test_block_error_is_the_frobenius_error_of_the_layer(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("qwen2_moe"))
    model = load(checkpoint.folder)
    exact = layer_outputs(model, 1, IDS)[0][-1]
    for projection in ("gate", "up", "down"):
        matrix = matrix_of(checkpoint, 1, 3, projection)
        set_matrix(model, matrix, rounded(checkpoint, matrix, THREE))
    expected = float((layer_outputs(model, 1, IDS)[0][-1] - exact).norm())
    assert gather(checkpoint, IDS, (THREE,)).block_errors[1, 3][THREE] == pytest.approx(expected, rel=1e-3)


def test_inputs_and_traces_equal_those_of_the_loaded_model(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral"))
    model = load(checkpoint.folder)
    inputs, experts, weights, _ = layer_outputs(model, 1, IDS)[0]
    token, slot = torch.where(experts == 2)
    x, w = inputs[token], weights[token, slot]
    module = model.model.layers[1].mlp.experts
    with torch.no_grad():
        gate, up = (x @ module.gate_up_proj[2].T).chunk(2, dim=1)
        hidden = module.act_fn(gate) * up
    found = gather(checkpoint, IDS)
    for projection, values in (("gate", x), ("up", x), ("down", hidden)):
        use = found.matrices[matrix_of(checkpoint, 1, 2, projection).name]
        assert use.input_mean_square == pytest.approx(float(values.square().mean()), rel=1e-4)
        trace = float((w[:, None] * values).square().sum()) / (TOKENS * values.shape[1])
        assert use.hessian_trace == pytest.approx(trace, rel=1e-4)
        assert use.baq == 0 and use.output_errors == {}
    assert found.experts[1, 2].mean_weight == pytest.approx(float(w.mean()), rel=1e-5)
    assert found.experts[1, 2].mean_square_weight == pytest.approx(float(w.square().sum()) / TOKENS, rel=1e-5)


def test_errors_are_zero_where_kept_and_grow_as_bits_shrink(save_family: Callable[..., Path]) -> None:
    found = gather(open_checkpoint(save_family("olmoe")), IDS, (KEPT, FOUR, THREE, TWO))
    tables = [use.output_errors for use in found.matrices.values()] + list(found.block_errors.values())
    for errors in tables:
        assert errors[KEPT] == 0 < errors[FOUR] < errors[THREE] < errors[TWO]


def test_keeping_32_bit_weights_in_16_costs_a_little(save_family: Callable[..., Path]) -> None:
    found = gather(open_checkpoint(save_family("olmoe", dtype=torch.float32)), IDS, (KEPT, FOUR))
    for use in found.matrices.values():
        assert 0 < use.output_errors[KEPT] < use.output_errors[FOUR] / 10


def test_expert_without_tokens_has_finite_zeros(save_family: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(changed(save_family("deepseek_v3"), tmp_path / "out", biased_to_first_two))
    found = gather(checkpoint, IDS, (KEPT, TWO), with_baq=True)
    assert [found.experts[1, expert].tokens for expert in range(EXPERTS)] == [TOKENS, TOKENS, 0, 0]
    assert [found.experts[1, expert].frequency for expert in range(EXPERTS)] == [0.5, 0.5, 0, 0]
    assert found.experts[1, 2] == found.experts[1, 3] == ExpertUse(0.0, 0.0, 0.0, 0)
    for matrix in checkpoint.with_role(Role.EXPERT):
        assert matrix.layer is not None and matrix.expert is not None
        use = found.matrices[matrix.name]
        numbers = [use.input_mean_square, use.hessian_trace, use.baq, use.output_errors[TWO]]
        numbers.append(found.block_errors[matrix.layer, matrix.expert][TWO])
        assert all(math.isfinite(number) for number in numbers)
        assert all(number > 0 if matrix.expert < 2 else number == 0 for number in numbers)


def test_uses_of_a_known_routing() -> None:
    experts = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.5, 0.25]])
    assert expert_uses(experts, weights, 4) == [
        ExpertUse(0.5, 2.5 / 4, (0.5625 + 0.25 + 1 + 0.0625) / 4, 4),
        ExpertUse(3 / 8, 0.25, (0.0625 + 0 + 0.25) / 4, 3),
        ExpertUse(1 / 8, 0.5, 0.25 / 4, 1),
        ExpertUse(0.0, 0.0, 0.0, 0),
    ]


def test_inputs_of_zero_have_no_curvature() -> None:
    assert curvature(torch.zeros(3, 8), torch.ones(3, dtype=torch.float64)) == 0


@pytest.mark.parametrize("tokens", [1, 5, 16, 40])
def test_curvature_equals_that_of_the_inverted_hessian(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(tokens, 16, generator=generator) * torch.linspace(0.1, 10, 16)
    square_weights = torch.rand(tokens, generator=generator, dtype=torch.float64)
    hessian = 2 * inputs.double().T @ (square_weights[:, None] * inputs.double())
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    expected = float((1 / torch.linalg.inv(hessian).diagonal()).sum())
    assert curvature(inputs, square_weights) == pytest.approx(expected, rel=1e-6)


def test_baq_constant_predicts_the_loss_of_a_plain_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, bits = torch.randn(4000, 32, generator=generator), 6
    weight = torch.rand(64, 32, generator=generator) - 0.5
    square_weights = torch.full((4000,), 1 / 4000, dtype=torch.float64)
    low, high = weight.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    grid = low + step * ((weight - low) / step).round()
    loss = float((inputs @ (weight - grid).T).square().sum()) / 4000
    # Independent columns leave nothing for later ones to make up, so plain rounding has the loss BAQ expects.
    expected = squared_row_ranges(weight) * curvature(inputs, square_weights) / 24 * 4.0**-bits
    assert loss == pytest.approx(expected, rel=0.1)


def test_range_of_a_row_includes_zero() -> None:
    assert squared_row_ranges(torch.tensor([[1.0, 2.0], [-1.0, 2.0], [-3.0, -1.0]])) == 4 + 9 + 9


def test_baq_is_positive_where_tokens_are(save_family: Callable[..., Path]) -> None:
    found = gather(open_checkpoint(save_family("qwen3_moe")), IDS, with_baq=True)
    assert all(use.baq > 0 for use in found.matrices.values())


def test_layouts_and_runs_agree(save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_checkpoint(save_family("mixtral"))
    first = gather(split, IDS, (TWO,), with_baq=True)
    monkeypatch.setattr(numerics, "PART_VALUES", 256)  # more parts than threads, as real matrices have
    assert gather(split, IDS, (TWO,), with_baq=True) == first
    fused = gather(open_checkpoint(save_family("mixtral", fused=True)), IDS, (TWO,), with_baq=True)
    assert fused == first


def test_json_gives_back_every_number(save_family: Callable[..., Path]) -> None:
    found = gather(open_checkpoint(save_family("qwen2_moe")), IDS, (KEPT, THREE, Choice(4, 64, True)), with_baq=True)
    assert Calibration.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["experts"]["0.1"] == dataclasses.asdict(found.experts[0, 1])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format_version": 9}', '{"format_version": 1, "experts": {"a": {}}}']
)
def test_text_that_is_no_calibration_is_refused(text: str) -> None:
    with pytest.raises(StatsError, match=r"cache\.json holds no calibration .*calibrate again"):
        Calibration.from_json(text, "cache.json")


def test_ggml_type_is_refused(save_family: Callable[..., Path]) -> None:
    with pytest.raises(ChoiceError, match="Q4_K is not rounded to nearest here"):
        gather(open_checkpoint(save_family("mixtral")), IDS, (parse_choice("Q4_K"),))
