"""Language models inside wrappers, and tensors under prefixes that no family's file lists."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq import pipeline
from alphaq.checkpoint.families.architecture import architecture_of
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.output import Output
from alphaq.errors import ArchitectureError
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from conftest import random_model
from families import logits, random_family, save_layout

MOE: dict[str, Any] = dict(
    model_type="qwen3_moe", num_hidden_layers=2, num_experts=3, num_experts_per_tok=2, hidden_size=64
)
DENSE: dict[str, Any] = dict(model_type="qwen2", num_hidden_layers=2, hidden_size=64)
GATED = dict(gate_proj=(32, 64), up_proj=(32, 64), down_proj=(64, 32))
ATTENTION = {f"self_attn.{part}_proj": (64, 64) for part in "qkvo"}


def saved(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A checkpoint of random numbers under given names."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def language_model(prefix: str, experts: int = 3, head: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small decoder; without experts a dense one."""
    parts: dict[str, tuple[int, ...]] = dict(ATTENTION) | {"input_layernorm": (64,)}
    if experts:
        parts |= {"mlp.gate": (experts, 64)}
        parts |= {f"mlp.experts.{e}.{name}": shape for e in range(experts) for name, shape in GATED.items()}
    else:
        parts |= {f"mlp.{name}": shape for name, shape in GATED.items()}
    shapes = {f"{prefix}.layers.{layer}.{part}.weight": shape for layer in range(2) for part, shape in parts.items()}
    shapes |= {f"{prefix}.embed_tokens.weight": (50, 64), f"{prefix}.norm.weight": (64,)}
    return shapes | ({f"{head}.weight": (50, 64)} if head else {})


TOWER = {
    f"vision_tower.encoder.layers.{layer}.{part}.weight": shape
    for layer in range(3)
    for part, shape in (ATTENTION | {f"mlp.{name}": shape for name, shape in GATED.items()}).items()
}


def quantized(source: Checkpoint, out: Path) -> Plan:
    """The plan of a native output of 2.5 bits."""
    request = resolve(PlanConfig(budget=Budget(bits=2.5), group_size=32, choices="2,3,4", method="alphaq"))
    plan = pipeline.make_plan(source, request, pipeline.measure_for_plan(source, request))
    pipeline.quantize(source, plan, out)
    return plan


@pytest.mark.parametrize(
    ("nested", "settings"),
    [
        ({"text_config": MOE}, "text_config"),
        ({"language_config": MOE}, "language_config"),
        ({"llm_config": MOE, "vision_config": {"model_type": "qwen2"}}, "llm_config"),
        ({"thinker_config": {"text_config": MOE}, "talker_config": {"text_config": MOE}}, "thinker_config.text_config"),
        ({"brain": {"words": MOE}}, "brain.words"),
        ({"audio_encoder": {"text_config": DENSE}, "lm": MOE}, "lm"),
        ({"aligner": DENSE, "lm": MOE}, "lm"),
        ({"lm": {**MOE, "model_type": None, "architectures": ["Qwen3MoeForCausalLM"]}}, "lm"),
    ],
)
def test_language_model_is_found_wherever_a_config_nests_it(nested: dict[str, Any], settings: str) -> None:
    architecture = architecture_of({"model_type": "new_vl", **nested})
    assert (architecture.name, architecture.settings) == ("qwen3_moe", (settings,))
    assert architecture.moe_layers(nested) == [0, 1]


@pytest.mark.parametrize(
    "nested",
    [
        {"vision_config": MOE},
        {"draft_model": MOE},
        {"a": {"b": {"c": {"d": {"e": MOE}}}}},
        {"text_config": "qwen3_moe"},
    ],
)
def test_what_is_no_language_model_of_a_config_is_not_taken_for_one(nested: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError, match=r"'new_vl'.* is unknown"):
        architecture_of({"model_type": "new_vl", **nested})


@pytest.mark.parametrize(
    "prefix", ["language_model.model", "model.language_model", "llm.model", "model.text_model", "vlm.backbone.decoder"]
)
def test_experts_are_found_under_any_prefix(prefix: str, tmp_path: Path) -> None:
    outer = prefix.rpartition(".")[0]
    shapes = TOWER | language_model(prefix, head=f"{outer}.lm_head")
    source = open_checkpoint(saved(tmp_path / "source", {"model_type": "new_vl", "llm_config": MOE}, shapes))
    assert len(source.with_role(Role.EXPERT)) == 2 * 3 * 3
    assert len(source.with_role(Role.ATTENTION)) == 2 * 4  # none of the tower's
    assert [matrix.name for matrix in source.with_role(Role.HEAD)] == [f"{outer}.lm_head.weight"]
    plan = quantized(source, tmp_path / "out")
    stored = Output(tmp_path / "out").stored
    assert all(stored[name].dtype == "U8" for name in plan.choices)


def test_layers_of_a_dense_language_model_are_told_from_a_towers_by_their_number(tmp_path: Path) -> None:
    shapes = TOWER | language_model("vlm.words", experts=0)
    source = open_checkpoint(saved(tmp_path / "source", {"model_type": "new_vl", "words": DENSE}, shapes))
    assert {matrix.name.split(".layers")[0] for matrix in source.planned} == {"vlm.words"}
    assert len(source.planned) == 2 * 3


def test_prefix_of_a_wrapper_with_missing_experts_is_no_excuse(tmp_path: Path) -> None:
    shapes = language_model("vlm.words")
    del shapes["vlm.words.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(ArchitectureError, match="first missing: layer 1, expert 2, up"):
        open_checkpoint(saved(tmp_path / "source", {"model_type": "new_vl", "words": MOE}, shapes))


# -- names of a base model ------------------------------------------------------------------------


def without_beginning(source: Path, folder: Path, beginning: str = "model.") -> Path:
    """A checkpoint as the model inside the one with a head saves itself."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix(beginning): one for name, one in tensors.items() if not name.startswith("lm_head")}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_base_model_is_quantized_as_the_model_around_it(family: str, tmp_path: Path) -> None:
    model = random_model(family, tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path / "whole", save_original_format=True)
    bare = open_checkpoint(without_beginning(tmp_path / "whole", tmp_path / "bare"))
    whole = open_checkpoint(tmp_path / "whole")
    assert bare.shard_of.keys() == whole.shard_of.keys()
    assert quantized(bare, tmp_path / "a").choices == quantized(whole, tmp_path / "b").choices
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({**MOE, "model_type": "kimi_k25", "text_config": dict(num_hidden_layers=2, n_routed_experts=3)}, "bare"),
        ({"model_type": "new_vl", "text_config": MOE}, "language_model"),
    ],
)
def test_names_of_a_wrappers_inner_models_are_read(config: dict[str, Any], names: str, tmp_path: Path) -> None:
    shapes = language_model("model") if names == "bare" else language_model("language_model")
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    if names == "bare":
        config = {**config, "text_config": {**config["text_config"], "first_k_dense_replace": 0}}
    source = open_checkpoint(saved(tmp_path / "source", config, bare))
    assert len(source.with_role(Role.EXPERT)) == 2 * 3 * 3


def test_name_that_is_there_with_and_without_its_beginning_is_refused(tmp_path: Path) -> None:
    shapes = {name.removeprefix("model."): shape for name, shape in language_model("model").items()}
    with pytest.raises(ArchitectureError, match=r"model\.embed_tokens\.weight is stored twice"):
        open_checkpoint(saved(tmp_path / "source", MOE, shapes | {"model.embed_tokens.weight": (50, 64)}))


# -- published families that transformers has no class for --------------------------------------------


def decoder(
    layers: Iterable[int], parts: Mapping[str, tuple[int, ...]], prefix: str = "model"
) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.layers.{layer}.{part}": shape for layer in layers for part, shape in parts.items()}


def gated(before: str, names: str = "gate_proj up_proj down_proj", hidden: int = 64) -> dict[str, tuple[int, ...]]:
    first, up, down = names.split()
    return {
        f"{before}{first}.weight": (32, hidden),
        f"{before}{up}.weight": (32, hidden),
        f"{before}{down}.weight": (hidden, 32),
    }


def routed(before: str, names: str = "gate_proj up_proj down_proj", hidden: int = 64) -> dict[str, tuple[int, ...]]:
    every = [gated(f"{before}experts.{expert}.", names, hidden) for expert in range(3)]
    return {name: shape for one in every for name, shape in one.items()} | {f"{before}gate.weight": (3, 64)}


SQUARE = (64, 64)
COUNTS: dict[str, Any] = dict(num_hidden_layers=2, n_routed_experts=3, num_experts_per_tok=2, first_k_dense_replace=1)
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], int]] = {
    "deepseek": (
        dict(COUNTS, moe_layer_freq=1),
        decoder([0], gated("mlp.")) | decoder([1], routed("mlp.") | gated("mlp.shared_experts.")),
        9,
    ),
    "deepseek_vl_v2": (
        dict(COUNTS, language_config=dict(COUNTS, architectures=["DeepseekV2ForCausalLM"])),
        decoder([0], gated("mlp.")) | decoder([1], routed("mlp."))
        | decoder(range(3), gated("mlp.") | {"self_attn.q_proj.weight": SQUARE}, "model.qwen2_model.model.model"),
        9,
    ),
    "bailing_moe": (
        dict(num_hidden_layers=2, num_experts=3, num_experts_per_tok=2, first_k_dense_replace=0),
        decoder(range(2), routed("mlp.") | {
            "attention.query_key_value.weight": (96, 64), "attention.dense.weight": SQUARE,
            "attention.query_layernorm.weight": (16,), "mlp.gate.expert_bias": (3,)})
        | {"model.word_embeddings.weight": (50, 64)},
        18,
    ),
    "mimo_v2": (
        dict(num_hidden_layers=3, n_routed_experts=3, num_experts_per_tok=2, moe_layer_freq=[0, 1, 1]),
        decoder([0], gated("mlp.")) | decoder([1, 2], routed("mlp."))
        | decoder(range(3), {"self_attn.qkv_proj.weight": (96, 64), "self_attn.o_proj.weight": SQUARE}),
        18,
    ),
    "arctic": (
        dict(num_hidden_layers=3, num_local_experts=3, num_experts_per_tok=2, moe_layer_frequency=2),
        decoder([0, 2], gated("block_sparse_moe.mlp.", "w1 w3 w2"))
        | decoder([1], routed("block_sparse_moe.", "w1 w3 w2") | gated("residual_mlp.", "w1 w3 w2")),
        9,
    ),
    "kimi_k3": (
        dict(text_config=dict(model_type="kimi_linear", num_hidden_layers=2, num_experts=3, num_experts_per_token=2,
            first_k_dense_replace=1, moe_layer_freq=1)),
        decoder([0], gated("mlp."), "language_model.model")
        | decoder([1], routed("block_sparse_moe.", "w1 w3 w2", 32) | gated("block_sparse_moe.shared_experts.")
            | {"block_sparse_moe.routed_expert_down_proj.weight": (32, 64),
               "block_sparse_moe.routed_expert_norm.weight": (32,),
               "block_sparse_moe.routed_expert_up_proj.weight": (64, 32)}, "language_model.model"),
        9,
    ),
    "internvl_chat": (dict(llm_config=MOE), language_model("language_model.model", head="language_model.lm_head"), 18),
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_family_without_a_class_is_quantized_whole(model_type: str, tmp_path: Path) -> None:
    config, shapes, experts = PUBLISHED[model_type]
    source = open_checkpoint(saved(tmp_path / "source", {"model_type": model_type, **config}, shapes))
    assert len(source.with_role(Role.EXPERT)) == experts
    plan = quantized(source, tmp_path / "out")
    large = {
        name for name, shape in shapes.items() if len(shape) == 2 and min(shape) >= 16 and "qwen2_model" not in name
    }
    forgotten = {n for n in large - plan.choices.keys() if source.roles[n] not in (Role.EMBEDDING, Role.HEAD)}
    assert forgotten == set()
    stored = Output(tmp_path / "out").stored
    assert all(stored[name].dtype == "U8" for name in plan.choices)


def test_unfused_experts_of_gemma_4_are_those_of_fused_ones(tmp_path: Path) -> None:
    fused = open_checkpoint(save_layout(random_family("gemma4"), tmp_path / "fused", published=True))
    (tmp_path / "unfused").mkdir()
    experts = fused.with_role(Role.EXPERT)
    tensors = load_file(fused.folder / "model.safetensors")
    kept = {name: one for name, one in tensors.items() if fused.roles[name] is not Role.EXPERT}
    save_file(
        kept | {matrix.name: fused.read(matrix) for matrix in experts},
        tmp_path / "unfused" / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "unfused" / "config.json").write_bytes((fused.folder / "config.json").read_bytes())
    unfused = open_checkpoint(tmp_path / "unfused")
    assert [matrix.name for matrix in sorted(unfused.with_role(Role.EXPERT), key=lambda one: one.place)] == [
        matrix.name for matrix in sorted(experts, key=lambda one: one.place)
    ]
    assert quantized(unfused, tmp_path / "a").choices == quantized(fused, tmp_path / "b").choices
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))
