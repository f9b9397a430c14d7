import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alphaq.checkpoint.families.architecture import Architecture, architecture_of, architectures
from alphaq.checkpoint.families.matching import match_tensors
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.summary import summarize
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import ArchitectureError
from alphaq.nouns.matrix import Role
from conftest import EXPERTS, FAMILIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NORMS = {Role.NORM, Role.OTHER}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_found_in_both_layouts(save_family: Callable[..., Path], family: str, fused: bool) -> None:
    checkpoint = open_checkpoint(save_family(family, fused))
    moe_layers = checkpoint.architecture.moe_layers(checkpoint.config)
    experts = checkpoint.with_role(Role.EXPERT)
    assert len(experts) == 3 * EXPERTS * len(moe_layers)
    assert any(matrix.index is not None for matrix in experts) == fused
    # Nothing large goes unrecognised: what is neither matrix nor norm is a bias or a tiny gate.
    unknown = [name for name, role in checkpoint.roles.items() if role is Role.OTHER and not name.endswith("bias")]
    assert unknown == []
    assert {Role.ATTENTION, Role.ROUTER, Role.EMBEDDING, Role.HEAD} <= set(checkpoint.roles.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_hold_the_same_matrices(save_family: Callable[..., Path], family: str) -> None:
    split, fused = open_checkpoint(save_family(family)), open_checkpoint(save_family(family, fused=True))
    by_name = {matrix.name: matrix for matrix in fused.matrices}
    for matrix in split.with_role(Role.EXPERT):
        assert torch.equal(split.read(matrix), fused.read(by_name[matrix.name])), matrix.name


def test_summary_counts_every_parameter(tiny: Path) -> None:
    summary = summarize(open_checkpoint(tiny))
    assert summary.architecture == "qwen2_moe"
    assert (summary.layers, summary.experts_per_layer, summary.expert_matrices) == (4, 8, 96)
    assert summary.bytes == 2 * summary.parameters == sum(role.bytes for role in summary.roles.values())


def test_unknown_architecture_is_told_with_those_of_like_names() -> None:
    with pytest.raises(ArchitectureError, match=r"Architecture 'qwen3moe' .* is unknown, near \['qwen3_moe'"):
        architecture_of({"model_type": "qwen3moe"})


TRANSPOSED = """
name = "toy"
model_types = ["toy"]
num_experts = ["experts"]
expert_name = "model.layers.{layer}.experts.{expert}.{projection}.weight"
[projections]
g = "gate"
u = "up"
d = "down"
[[tensors]]
template = "model.layers.{layer}.experts.gate_up"
role = "expert"
stacked = ["gate", "up"]
transposed = true
[[tensors]]
template = "model.layers.{layer}.experts.down"
role = "expert"
stacked = ["down"]
transposed = true
"""


def test_transposed_fused_tensors_come_apart_as_rows_and_columns() -> None:
    toy = Architecture.parse(tomllib.loads(TRANSPOSED))
    tensors = [
        TensorInfo("model.layers.0.experts.gate_up", "F32", (2, 8, 12), 0, 0),
        TensorInfo("model.layers.0.experts.down", "F32", (2, 6, 8), 0, 0),
    ]
    matrices, _ = match_tensors(toy, {"experts": 2, "num_hidden_layers": 1}, tensors)
    assert [(m.name.split(".", 4)[-1], m.shape, m.row_start) for m in matrices[:2]] == [
        ("0.g.weight", (6, 8), 0),
        ("0.u.weight", (6, 8), 6),
    ]
    assert matrices[-1].shape == (8, 6)


def qwen(names: list[str], **config: object) -> None:
    infos = [TensorInfo(name, "BF16", (4, 4), 0, 32) for name in names]
    match_tensors(architectures()["qwen2_moe"], {"num_hidden_layers": 1, "num_experts": 2, **config}, infos)


def expert_names(count: int) -> list[str]:
    return [
        f"model.layers.0.mlp.experts.{expert}.{projection}_proj.weight"
        for expert in range(count)
        for projection in ("gate", "up", "down")
    ]


def test_complete_experts_are_accepted() -> None:
    qwen(expert_names(2))


def test_missing_expert_is_named() -> None:
    with pytest.raises(ArchitectureError, match=r"Found 5 .* promises 6; first missing: layer 0, expert 1, down"):
        qwen(expert_names(2)[:-1])


def test_extra_expert_is_named() -> None:
    with pytest.raises(ArchitectureError, match=r"not promised by config\.json: layer 0, expert 2"):
        qwen(expert_names(3))


def test_expert_that_matches_no_template_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="looks like an expert"):
        qwen([*expert_names(2), "model.layers.0.mlp.experts.0.extra_proj.weight"])


def test_multi_token_prediction_layers_are_kept_aside() -> None:
    qwen([*expert_names(2), "model.layers.1.mlp.experts.0.gate_proj.weight"])


@pytest.mark.parametrize("bad", [-1, "4", 2.0, True])
def test_senseless_counts_in_config_are_refused(bad: object) -> None:
    with pytest.raises(ArchitectureError, match="num_experts"):
        qwen(expert_names(2), num_experts=bad)


@pytest.mark.parametrize("none", [None, 0])
def test_experts_of_a_model_that_is_to_have_none_are_an_error(none: object) -> None:
    with pytest.raises(ArchitectureError, match=r"Found 6 expert matrices but config\.json promises 0"):
        qwen(expert_names(2), num_experts=none)


def test_expert_stored_in_both_layouts_is_an_error() -> None:
    names = [*expert_names(2), "model.layers.0.mlp.experts.down_proj"]
    infos = [TensorInfo(n, "BF16", (2, 4, 4) if n.endswith("down_proj") else (4, 4), 0, 0) for n in names]
    with pytest.raises(ArchitectureError, match="stored twice"):
        match_tensors(architectures()["qwen2_moe"], {"num_hidden_layers": 1, "num_experts": 2}, infos)


def test_experts_of_one_layer_must_agree_in_shape() -> None:
    infos = [TensorInfo(n, "BF16", (8, 4) if "1.gate" in n else (4, 4), 0, 0) for n in expert_names(2)]
    with pytest.raises(ArchitectureError, match=r"experts\.1\.gate_proj\.weight has shape \[8, 4\]"):
        match_tensors(architectures()["qwen2_moe"], {"num_hidden_layers": 1, "num_experts": 2}, infos)


@pytest.mark.parametrize(
    "config",
    [
        {"decoder_sparse_step": "x"},
        {"decoder_sparse_step": 2.5},
        {"mlp_only_layers": 5},
        {"num_hidden_layers": 99_999, "num_experts": 99_999},
    ],
    ids=str,
)
def test_hostile_configs_are_refused_at_once(config: dict[str, object]) -> None:
    with pytest.raises(ArchitectureError, match=r"config\.json"):
        qwen(expert_names(2), **config)


@pytest.mark.parametrize("name", ["00", "1" * 5000, "٣"])
def test_odd_spellings_of_a_number_are_no_expert(name: str) -> None:
    with pytest.raises(ArchitectureError, match=r"looks like an expert"):
        qwen([*expert_names(2), f"model.layers.0.mlp.experts.{name}.gate_proj.weight"])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_matrices_are_refused(shape: tuple[int, int]) -> None:
    infos = [TensorInfo(name, "BF16", shape, 0, 0) for name in expert_names(2)]
    with pytest.raises(ArchitectureError, match="no elements"):
        match_tensors(architectures()["qwen2_moe"], {"num_hidden_layers": 1, "num_experts": 2}, infos)


@pytest.mark.parametrize("model_type", [None, ["mixtral"], {}, 3])
def test_model_type_of_another_kind_is_unknown(model_type: object) -> None:
    with pytest.raises(ArchitectureError, match="unknown"):
        architecture_of({"model_type": model_type})
