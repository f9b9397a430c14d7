"""Every Mixture-of-Experts family that transformers can configure, from its own class to logits and back.

docs/models.md shows the same figures as a table; `scripts/models_table.py` writes it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq.checkpoint.families.architecture import architecture_of, architectures, unsupported
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import ArchitectureError, BudgetError
from alphaq.nouns.matrix import Role
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import Scope, resolve
from alphaq.planning.limits import problem_of
from families import FAMILIES, ONE_LAYOUT, UNLOADABLE, moe_model_types, outcome, random_family, save_layout

OFTEN = ("mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "dbrx", "qwen3_vl_moe", "nemotron_h", "inkling2_text")
TWINS = {family for family in FAMILIES if family.endswith("_text") and family.removesuffix("_text") in FAMILIES}
"""Language models of multi-modal families, on their own."""
ROWS = [
    pytest.param(family, published, marks=() if often and family != "muse_spark" else pytest.mark.slow)
    for family in FAMILIES
    for published, often in ((True, family not in TWINS), (False, family in OFTEN))
    if published or family not in ONE_LAYOUT | UNLOADABLE
]


@pytest.mark.parametrize(("family", "published"), ROWS)
def test_family_is_found_whole_and_loads_as_its_dequantized_self(family: str, published: bool, tmp_path: Path) -> None:
    found = outcome(random_family(family), tmp_path, published)
    assert found.found == found.expected
    assert found.wide == 0
    assert found.kept <= {Role.EMBEDDING, Role.HEAD, Role.ROUTER, Role.NORM}
    assert_every_router_is_checked(tmp_path / "source")
    assert found.difference < 1e-4
    assert found.change > 1e-3  # quantization did change something


def assert_every_router_is_checked(folder: Path) -> None:
    """Each layer with experts has a tensor that counts them."""
    source = open_checkpoint(folder)
    family, config = source.architecture, source.config
    matched = [family.first_match(name) for name in source.shard_of]
    layers = {
        int(match["layer"]) for rule, match in matched if rule is not None and match is not None and rule.per_expert
    }
    assert set(family.moe_layers(config)) <= layers


def test_columns_first_as_the_hub_has_them_or_last_give_the_same_matrices(tmp_path: Path) -> None:
    saved = save_layout(random_family("qwen3_vl_moe"), tmp_path / "saved", published=True)
    turned = Path(shutil.copytree(saved, tmp_path / "turned"))
    tensors = load_file(saved / "model.safetensors")
    fused = {name: one.transpose(1, 2).contiguous() for name, one in tensors.items() if "mlp.experts" in name}
    save_file(tensors | fused, turned / "model.safetensors", {"format": "pt"})
    source, other = open_checkpoint(saved), open_checkpoint(turned)
    assert [matrix.name for matrix in source.planned] == [matrix.name for matrix in other.planned]
    assert not any(matrix.transposed for matrix in source.planned)
    assert all(matrix.transposed for matrix in other.planned)
    for mine, its in zip(source.planned, other.planned, strict=True):
        assert torch.equal(source.read(mine), other.read(its))


def test_tensors_that_are_not_the_language_model_are_copied() -> None:
    """Heads for multi-token prediction and the model that speaks have experts of their own."""
    names = (
        ("qwen3_next", "mtp.layers.0.mlp.experts.0.gate_proj.weight"),
        ("deepseek_v4", "mtp.0.ffn.experts.0.w1.weight"),
        ("longcat_flash", "model.mtp.layers.0.transformer_layer.mlp.experts.0.gate_proj.weight"),
        ("qwen3_omni_moe", "talker.model.layers.0.mlp.experts.0.gate_proj.weight"),
    )
    for family, name in names:
        rule, _ = architectures()[family].first_match(name)
        assert rule is not None, family
        assert rule.role is Role.OTHER, family


def test_published_names_that_transformers_itself_does_not_save() -> None:
    names = (
        ("qwen3_omni_moe", "thinker.model.layers.3.mlp.experts.5.up_proj.weight", "up"),
        ("kimi_k2", "model.layers.1.mlp.experts.383.down_proj.weight", "down"),
        ("qwen3_5_moe", "model.language_model.layers.0.mlp.experts.gate_up_proj", None),
        ("nemotron_h", "backbone.layers.51.mixer.experts.127.up_proj.weight", "up"),
    )
    for family, name, projection in names:
        architecture = architectures()[family]
        rule, found = architecture.first_match(name)
        assert rule is not None, family
        assert rule.role is Role.EXPERT, family
        assert found is not None
        assert projection is None or architecture.projections[found["projection"]] == projection


@pytest.mark.parametrize(
    ("family", "config", "layers"),
    [
        ("nemotron_h", {"hybrid_override_pattern": "MEM*E-"}, [1, 4]),
        ("ernie4_5_moe", {"num_hidden_layers": 6, "moe_layer_start_index": 1, "moe_layer_end_index": 4}, [1, 2, 3, 4]),
        ("ernie4_5_moe", {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": -1}, [1, 2, 3]),
        ("jamba", {"num_hidden_layers": 8, "expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3, 5, 7]),
        ("llama4", {"text_config": {"num_hidden_layers": 4, "moe_layers": [1, 3]}}, [1, 3]),
        ("llama4", {"text_config": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}}, [1, 3]),
        ("glm4_moe_lite", {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}, [1, 2]),
        ("kimi_k25", {"text_config": {"num_hidden_layers": 4, "first_k_dense_replace": 1}}, [1, 2, 3]),
        ("mimo_v2_flash", {"num_hidden_layers": 4, "moe_layer_freq": [0, 1, 0, 1]}, [1, 3]),
        ("step3p7", {"text_config": {"num_hidden_layers": 6, "moe_layers_enum": "3,4,5"}}, [3, 4, 5]),
        ("step3p7", {"text_config": {"num_hidden_layers": 5}}, [3, 4]),
        ("inkling_mm_model", {"text_config": {"num_hidden_layers": 3, "dense_mlp_idx": 2}}, [2]),
        ("unlimited_ocr", {"language_config": {"num_hidden_layers": 3}}, [1, 2]),
        ("exaone_moe", {"num_hidden_layers": 3}, [1, 2]),
        ("glm_moe_dsa", {"num_hidden_layers": 5}, [3, 4]),
        ("glm_moe_dsa", {"num_hidden_layers": 3, "first_k_dense_replace": 0}, [0, 1, 2]),
    ],
)
def test_layers_with_experts_follow_the_config(family: str, config: dict[str, Any], layers: list[int]) -> None:
    architecture = architectures()[family]
    counts = dict.fromkeys(architecture.num_experts_keys, 8)
    nested = {key: counts | part if isinstance(part, dict) else part for key, part in config.items()}
    assert architecture.moe_layers(counts | nested) == layers


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("granitemoehybrid", {"num_local_experts": 0}),
        ("gemma4", {"text_config": {"num_hidden_layers": 2, "num_experts": None}}),
        ("deepseek_v3", {"n_routed_experts": None}),
        ("jamba", {"num_experts": 1}),
        ("nemotron_h", {"layers_block_type": ["mamba", "mlp"]}),
    ],
)
def test_dense_members_of_a_family_have_no_layers_with_experts(family: str, config: dict[str, Any]) -> None:
    assert architectures()[family].moe_layers({"num_hidden_layers": 2} | config) == []


def test_unknown_model_type_with_a_known_language_model_takes_its_architecture() -> None:
    config = {"model_type": "new_vl", "text_config": {"model_type": "qwen3_moe", "num_hidden_layers": 1}}
    architecture = architecture_of(config)
    assert architecture.name == "qwen3_moe"
    for prefix in ("model.language_model", "language_model.model", "model"):
        rule, _ = architecture.first_match(f"{prefix}.layers.0.mlp.experts.0.up_proj.weight")
        assert rule is not None
        assert rule.role is Role.EXPERT


def test_every_model_type_of_transformers_with_experts_is_known_or_named() -> None:
    assert moe_model_types() - architectures().keys() == unsupported().keys() & moe_model_types()


def test_method_for_experts_is_refused_for_a_dense_model(tmp_path: Path) -> None:
    source = open_checkpoint(save_layout(random_family("llama"), tmp_path, published=True))
    request = resolve(PlanConfig(budget=Budget(bits=2.5), method="pmq", choices="1,2,3"))
    with pytest.raises(BudgetError, match=r"weighs routed experts, and .* has none"):
        problem_of(Scope.of(source, request))


def test_unsupported_family_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "switch_transformers"}))
    with pytest.raises(ArchitectureError, match=r"'switch_transformers' .* is not supported: an encoder"):
        open_checkpoint(tmp_path)
