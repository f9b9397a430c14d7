"""Families that MLX is written for by tables alone: mlx-lm itself computes what their files stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from changed import EXACT, MIXED, RUN, YARN, InEngine, model_of, saved
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.assumptions.tables import engine_table, family_settings
from alphaq.engines.effective import understood
from alphaq.engines.mlx.config import told
from alphaq.engines.mlx.profile import ENGINE
from alphaq.engines.mlx.profile import logits as mlx_logits
from alphaq.engines.settings import require_settings
from alphaq.errors import ArchitectureError, PlanError
from conftest import FAMILIES, MORE_FAMILIES
from families import ONE_LAYOUT, UNLOADABLE, random_family, save_layout

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

IN_MLX = InEngine("mlx", mlx_logits)
difference = IN_MLX.difference
OFTEN = {"dots1", "lfm2_moe", "gemma4", "qwen3_5_moe"}
"""Names, dense layers by other names, a model inside another, and norms that mlx-lm changes."""


@pytest.mark.parametrize(
    "model_type", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in RUN]
)
def test_mlx_lm_computes_with_a_mixed_plan_what_its_files_stand_for(tmp_path: Path, model_type: str) -> None:
    assert difference(saved(tmp_path / "source", model_type), tmp_path, MIXED) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(RUN.keys() - ONE_LAYOUT - UNLOADABLE - {"kimi_k25"}))
def test_names_of_transformers_own_modules_are_written_as_those_of_the_hub(tmp_path: Path, model_type: str) -> None:
    source = save_layout(model_of(model_type), tmp_path / "source", published=False)
    assert difference(source, tmp_path, MIXED) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("model_type", RUN)
def test_every_setting_of_the_class_is_followed_or_refused(tmp_path: Path, model_type: str) -> None:
    assert not IN_MLX.wrong(tmp_path, model_type, saved)


Edit = Callable[[dict[str, Any]], object]
"""What a stranger's config.json has otherwise than transformers writes it."""


def _without(key: str) -> Edit:
    return lambda config: config.pop(key)


def _kimi_k2(config: dict[str, Any]) -> None:
    config["text_config"]["model_type"] = "kimi_k2"
    del config["text_config"]["rope_interleave"]


def _edited(source: Path, edit: Edit) -> Path:
    config = json.loads((source / "config.json").read_text())
    edit(config)
    (source / "config.json").write_text(json.dumps(config))
    return source


HALF = dict(rope_theta=1e4, rope_type="default", partial_rotary_factor=0.5)
SLIDING, FULL = dict(rope_theta=1e4, rope_type="default"), dict(rope_theta=1e4, **YARN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changed", "edit"),
    [
        ("deepseek_v32", {}, dict(indexer_rope_interleave=True)),
        ("glm_moe_dsa", {}, dict(indexer_rope_interleave=False)),
        ("longcat_flash", {}, dict(norm_topk_prob=True)),
        ("laguna", {}, dict(moe_router_score_func="sqrtsoftplus", qkv_bias=True)),
        ("qwen3_5_moe_text", {}, dict(norm_topk_prob=False)),
        ("solar_open", {}, dict(use_qk_norm=True)),
        ("minimax_m2", {}, dict(use_qk_norm=False)),
        ("nemotron_h", {}, _without("attention_bias")),
        ("gemma4_text", dict(use_bidirectional_attention="vision"), {}),
        ("minimax_m2", dict(rope_parameters=HALF), {}),
        ("laguna", dict(rope_parameters=dict(full_attention=FULL, sliding_attention=SLIDING)), {}),
        ("mellum", dict(rope_parameters=dict(full_attention=FULL, sliding_attention=SLIDING)), {}),
        ("kimi_k25", dict(text_config=RUN["kimi_k25"]["text_config"] | dict(rope_parameters=FULL)), _kimi_k2),
    ],
)
def test_what_published_configs_say_is_computed_as_the_class_does(
    tmp_path: Path, model_type: str, changed: dict[str, Any], edit: dict[str, Any] | Edit
) -> None:
    source = saved(tmp_path / "source", model_type, **changed)
    _edited(source, edit if callable(edit) else lambda config: config.update(edit))
    assert difference(source, tmp_path, MIXED) < EXACT


YARN_ALONE = dict(rope_theta=1e4, llama_4_scaling_beta=0.1, max_position_embeddings=2048, **YARN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changed", "named"),
    [
        ("exaone_moe", dict(layer_types=["full_attention"] * 3), "layer_types"),
        ("afmoe", dict(layer_types=["sliding_attention"] * 3), "layer_types"),
        ("mistral4", dict(rope_parameters=YARN_ALONE | dict(mscale_all_dim=1.0)), "rope_parameters.mscale"),
        ("mistral4", dict(rope_parameters=YARN_ALONE | dict(mscale=0.7)), "rope_parameters.mscale"),
    ],
)
def test_settings_that_differ_together_are_refused(
    tmp_path: Path, model_type: str, changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ArchitectureError, match=f"{named} is"):
        require_settings(open_checkpoint(saved(tmp_path / "source", model_type, **changed)), "mlx")


@pytest.mark.slow
def test_a_language_model_alone_may_have_the_names_of_one_beside_others(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "qwen3_5_moe_text")
    tensors = load_file(source / "model.safetensors")
    assert not any(name.startswith("model.language_model.") for name in tensors)
    longer = {name.replace("model.", "model.language_model.", 1): one for name, one in tensors.items()}
    save_file(longer, source / "model.safetensors", {"format": "pt"})
    assert difference(source, tmp_path, MIXED) < EXACT


@pytest.mark.slow
def test_what_a_config_leaves_to_its_class_is_told(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "mistral3")
    _edited(source, lambda config: config["text_config"].pop("vocab_size"))
    assert told(open_checkpoint(source))["vocab_size"] == CONFIG_MAPPING["mistral4"]().vocab_size


def test_a_word_that_mlx_lm_has_none_for_is_refused_by_name() -> None:
    rule = engine_table("mlx").families["granitemoehybrid"].derived["layer_types"]
    with pytest.raises(ArchitectureError, match=r"layer_types has 'sliding_attention'.*--engine native"):
        rule.value({"layer_types": ["sliding_attention"]})


INSIDE = {
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "mistral3": "mistral4",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5",
    "qwen3_vl_moe": "qwen3_moe",
}
"""mlx-lm's modules of language models, where they are called otherwise."""
UNREAD = {
    "dots1": {"scoring_func"},  # by nothing in its module
    "gemma4": {"global_partial_rotary_factor", "partial_rotary_factor", "sliding_window_pattern"},  # lists go before
    "glm4_moe_lite": {"num_nextn_predict_layers", "partial_rotary_factor", "quantization"},
    "laguna": {"partial_rotary_factor"},  # of layers of each kind goes before
    "nemotron_h": {"layer_types"},  # layers_block_type goes before
    "phimoe": {"original_max_position_embeddings"},  # only by longrope
}


@pytest.mark.parametrize("family", engine_table("mlx").families)
def test_whatever_mlx_lm_reads_is_told_or_asked(family: str) -> None:
    """A key of config.json that mlx-lm reads and transformers' class does not know would go through unasked."""
    from mlx_lm.utils import MODEL_REMAPPING

    known = {kind: one for kind, one in architectures().items() if family in (kind, one.name)}
    kind = family if family in known else next(iter(known))
    module = import_module(f"mlx_lm.models.{INSIDE.get(kind, MODEL_REMAPPING.get(kind, kind))}")
    args = next(getattr(module, name) for name in ("TextModelArgs", "TextArgs", "ModelArgs") if hasattr(module, name))
    lines = family_settings("mlx", known[kind], kind)
    written = {key.rpartition(".")[2] for key in lines.carried} | lines.lines.derived.keys()
    written |= {"model_type", "rope_theta", "rope_scaling", known[kind].num_experts_keys[0]}
    read = {one.name: one for one in fields(args)}
    unasked = read.keys() - written - lines.fixed.keys() - UNREAD.get(family, set())
    assert unasked <= _class_knows(kind)
    required = {name for name, one in read.items() if one.default is MISSING and one.default_factory is MISSING}
    assert required <= written | {"text_config"}


def _class_knows(kind: str) -> set[str]:
    inner = {"mistral3": "mistral4", "kimi_k25": "deepseek_v3", "gemma4": "gemma4_text"}.get(kind)
    kind = inner or {"qwen3_5_moe": "qwen3_5_moe_text", "qwen3_vl_moe": "qwen3_vl_moe_text"}.get(kind, kind)
    return set(understood(CONFIG_MAPPING[kind], {}))


def test_every_family_of_the_table_is_run() -> None:
    """By a model of each; one of some is inside another."""
    known, families = {kind: one.name for kind, one in architectures().items()}, engine_table("mlx").families
    run = {kind if kind in families else known[kind] for kind in RUN if kind in known}
    assert run | FAMILIES.keys() | MORE_FAMILIES.keys() == families.keys()


@pytest.mark.parametrize("family", engine_table("mlx").refused)
def test_what_mlx_lm_computes_otherwise_is_refused_with_the_reason(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(save_layout(random_family(family), tmp_path / "source", published=True))
    with pytest.raises(PlanError, match=engine_table("mlx").refused[family]):
        ENGINE.layout(checkpoint, {})


@pytest.mark.slow
def test_gemma_s_heads_of_full_attention_are_told_as_published(tmp_path: Path) -> None:
    """By names of its own; transformers saves them by layer, which mlx-lm does not read."""
    heads = dict(attention_k_eq_v=True, global_head_dim=32, num_global_key_value_heads=1)
    source = saved(tmp_path / "source", "gemma4_text", **heads)
    with pytest.raises(ArchitectureError, match="per_layer_config"):
        require_settings(open_checkpoint(source), "mlx")
    config = json.loads((source / "config.json").read_text())
    del config["per_layer_config"]
    (source / "config.json").write_text(json.dumps(config | heads))
    assert difference(source, tmp_path, MIXED) < EXACT


def test_settings_must_lie_where_mlx_lm_looks_for_them(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gemma4")
    config = json.loads((source / "config.json").read_text())
    config["llm_config"] = config.pop("text_config")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match="elsewhere than under text_config"):
        ENGINE.layout(open_checkpoint(source), {})
