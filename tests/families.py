"""A tiny random model of every Mixture-of-Experts family of the installed transformers, and what must hold for it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from alphaq import pipeline
from alphaq.calibration.stream import model_class
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.weights import read_shards
from alphaq.engines.output import Output
from alphaq.nouns.matrix import Role
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.runtime.packed import PackedWeights
from conftest import read_back

EXPERTS = 6
SMALL: dict[str, Any] = dict(
    vocab_size=340, vocab_size_per_layer_input=340, hidden_size=64, d_model=64, out_hidden_size=64,
    intermediate_size=96, moe_intermediate_size=48, shared_expert_intermediate_size=48, expert_ffn_hidden_size=48,
    ffn_hidden_size=96, hidden_size_per_layer_input=16, moe_shared_expert_intermediate_size=48, share_expert_dim=48,
    dense_intermediate_size=96, shared_experts_intermediate_size=48, swa_head_dim=16, rel_extent=32, mlp_dim=96,
    moe_hidden_size=64, vision_output_dim=64, projector_input_dim=64, projector_output_dim=64,
    num_hidden_layers=3, num_layers=3, n_layers=3, depth=2,
    num_attention_heads=4, n_heads=4, num_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=16,
    num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, moe_num_experts=EXPERTS,
    num_experts_per_tok=2, num_experts_per_token=2, moe_topk=2, moe_k=2, top_k_experts=2,
    n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1, zero_expert_num=0,
    n_group=1, topk_group=1, num_expert_group=1,
    q_lora_rank=32, kv_lora_rank=32, o_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    index_topk=8, index_head_dim=16, index_n_heads=2,
    linear_num_heads=4, linear_head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16,
    mamba_chunk_size=16, chunk_size=16, n_groups=1,
    max_position_embeddings=256, sliding_window=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    first_k_dense_replace=1, num_dense_layers=1, patch_size=4, image_size=16, temporal_patch_size=1,
    spatial_merge_size=1,
)  # fmt: skip
HEADS = dict(num_key_value_heads=4)
MIXED = dict(layer_types=["linear_attention", "full_attention", "linear_attention"])
SPARSE = dict(mlp_layer_types=["dense", "sparse", "sparse"])
MROPE = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[1, 1, 2])
AUDIO = dict(encoder_attention_heads=4, encoder_ffn_dim=48, encoder_layers=1, output_dim=64)
DSA = dict(layer_types=["linear_attention", "indexed_attention", "linear_attention"])
QSA = DSA | dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4
)  # fmt: skip
GEMMA = dict(
    enable_moe_block=True, num_experts=EXPERTS, top_k_experts=2, moe_intermediate_size=48, num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip

# What a family needs beside SMALL, under the names of its config; None leaves a setting at its default.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria": {},
    "aria_text": {},
    "axk1": HEADS,
    "axk2": HEADS,
    "bailing_hybrid": HEADS | MIXED,
    "beam": SPARSE,
    "cohere2_moe": {},
    "dbrx": dict(attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8), ffn_config=dict(moe_top_k=2)),
    "deepseek_ocr2": dict(text_config=SPARSE),
    "deepseek_v2": HEADS,
    "deepseek_v3": HEADS,
    "deepseek_v32": HEADS,
    "deepseek_v4": dict(
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention", "compressed_sparse_attention"],
        num_hash_layers=1,
    ),
    "dots1": {},
    "dots3_note_text": HEADS,
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4": dict(text_config=GEMMA),
    "gemma4_text": GEMMA,
    "glm4_moe": {},
    "glm4_moe_lite": HEADS,
    "glm4v_moe": dict(
        text_config=dict(rope_parameters=MROPE)
    ),
    "glm5_next": dict(text_config=HEADS | SPARSE | DSA | dict(index_kpool=4, qk_rope_head_dim=0)),
    "glm_moe_dsa": HEADS,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": MIXED,
    "granitemoeshared": dict(shared_intermediate_size=48),
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_mm_model": dict(vision_config=dict(patch_size=40, temporal_patch_size=2)),
    "inkling2": dict(vision_config=dict(text_hidden_size=64)),
    "inkling_text": {},
    "inkling2_text": {},
    "internvl": dict(text_config=dict(model_type="qwen3_moe")),
    "jamba": dict(
        num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "jetmoe": {},
    "kimi_k25": dict(text_config=HEADS),
    "kimi_linear": HEADS | MIXED,
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"]),
    "llama4": {},
    "llama4_text": {},
    "longcat_flash": HEADS,
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "minimax_m3_vl_text": {},
    "mistral3": dict(text_config=HEADS | dict(model_type="mistral4", head_dim=32)),
    "mistral4": HEADS | dict(head_dim=32),
    "mistral_large4": dict(text_config=HEADS),
    "mixtral": {},
    "muse_spark": dict(audio_config=dict(num_hidden_layers=4, out_hidden_size=64)),
    "nemotron_h": {},
    "olmoe": {},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe": dict(text_config=MIXED),
    "qwen3_5_moe_text": MIXED,
    "qwen3_moe": {},
    "qwen3_next": MIXED,
    "qwen3_omni_moe_thinker": dict(audio_config=AUDIO),
    "qwen3_vl_moe": {},
    "qwen4_exp": dict(text_config=QSA),
    "qwen4_exp_text": QSA,
    "solar_open": {},
    "step3p7": dict(text_config=SPARSE),
    "unlimited_ocr": {},
    "zaya": dict(num_experts_per_tok=1),
    # Dense ones, a few of those that architectures/dense.toml and dense_fused.toml list.
    "gemma2": {},
    "glm4": {},
    "llama": {},
    "qwen3": {},
}  # fmt: skip

ONE_LAYOUT = {
    "dbrx", "gemma4", "gemma4_text", "glm4", "gpt_oss", "granitemoe_swa", "inkling_text", "jetmoe",
    "llama", "llama4", "llama4_text", "minimax_m3_vl_text", "mistral4", "openai_privacy_filter", "qwen3",
    "qwen3_vl_moe", "zaya", "gemma2",
}  # fmt: skip
"""Families that are published with the names of transformers' own modules."""
UNLOADABLE = {"deepseek_ocr2", "laguna", "unlimited_ocr"}
"""Families whose model transformers cannot load again if it was saved with the names of its modules."""

HUB_NAMES = {
    "kimi_k25": {r"^(language_model\.model)\.blocks": r"\1.layers"},
    "kimi_linear": {r"block_sparse_moe\.(gate_proj|up_proj|down_proj)": r"mlp.\1"},  # of the dense layer
    "deepseek_v4": {
        r"^model\.": "", r"^embed_tokens\.": "embed.", r"^hc_head\.hc_": "hc_head_",
        r"\.attn\.norm\.": ".attn.kv_norm.",
    },
    "hy_v4": {
        r"^model\.hc_pre\.hc_head": "model.hc_head", r"hc_pre\.(hc_\w+_layer)\.": r"\1.hc_pre.",
        r"(mlp|experts)\.linear_gate\.": r"\1.gate_proj.",
    },
}  # fmt: skip
"""What must be changed in names that transformers gives when it saves a model, to have those of the hub."""


def moe_model_types() -> set[str]:
    """Every `model_type` of the installed transformers that has a class for words and modules of experts."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    root = Path(importlib.import_module("transformers.models").__file__ or "").parent
    heads = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    writes = {name for head in heads for name in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")}
    pattern = re.compile(r"^class \w*(Experts|Moe|MoE|MOE)\w*\(", re.MULTILINE)

    def has_experts(model_type: str) -> bool:
        files = (root / model_type_to_module_name(model_type)).glob("modeling_*.py")
        return any(pattern.search(file.read_text()) for file in files)

    return {name for name in CONFIG_MAPPING_NAMES if name in writes and has_experts(name)}


def config_of(family: str, sizes: Mapping[str, Any] = SMALL, **overrides: Any) -> Any:
    """A family's smallest config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[family], sizes, {**FAMILIES.get(family, {}), **overrides})


def _small(cls: Any, sizes: Mapping[str, Any], overrides: dict[str, Any]) -> Any:
    """The sizes for the keys that a config class has, and for those of the configs inside it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    default = cls()
    settings = default.to_dict()
    inner = {name: getattr(default, name) for name in cls.sub_configs}
    small = {
        key: value
        for key, value in sizes.items()
        if key in settings and key not in inner and not isinstance(settings[key], list | dict)
    }
    for name, one in inner.items():
        if one is not None:
            own = dict(overrides.get(name, {}))
            kind = CONFIG_MAPPING[own.pop("model_type")] if "model_type" in own else type(one)
            small[name] = _small(kind, sizes, own)
    return cls(**small | {key: value for key, value in overrides.items() if key not in inner})


def random_family(family: str, sizes: Mapping[str, Any] = SMALL, **overrides: Any) -> Any:
    """A tiny model of the family's own class, float32, with spectra that differ by matrix."""
    torch.manual_seed(0)
    config = config_of(family, sizes, **overrides)
    model = model_class(config)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.05)
                parameter.mul_(1 + torch.rand(parameter.shape[0]).view(-1, *[1] * (parameter.ndim - 1)))
    return model


DEAD, ALIKE = 4, (1, 5)
"""Experts of `with_useless_experts`."""


def with_useless_experts() -> Any:
    """A random model in whose layers no token goes to one expert, and two are the same."""
    model = random_family("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True)
    with torch.no_grad():
        for layer in model.model.layers:
            router, experts = layer.mlp.gate.weight, layer.mlp.experts
            for values in (router, experts.gate_up_proj, experts.down_proj):
                values[ALIKE[1]] = values[ALIKE[0]]
            router[DEAD] = router[[0, 1, 2, 3]].mean(0)  # never the largest
    return model


def planned_weights(model: Any) -> int:
    """Weights of a model's routed experts, counted in its own modules; of its MLPs if it has none."""
    modules = {module: path for path, module in model.named_modules() if "shared" not in path}
    experts = [module for module in modules if re.search("Experts$|ExpertGLU$", type(module).__name__)]
    dense = [child for module, path in modules.items() if path.endswith(".mlp") for child in module.children()]
    return sum(
        parameter.numel()
        for module in experts or dense
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" not in name and parameter.ndim > 1
    )


def save_layout(model: Any, folder: Path, published: bool) -> Path:
    """A model's bf16 checkpoint, under the names of the hub or those of its own modules."""
    model.bfloat16().save_pretrained(folder, save_original_format=published)
    if published and (names := HUB_NAMES.get(model.config.model_type)):
        tensors = load_file(folder / "model.safetensors")
        renamed = {_renamed(name, names): one for name, one in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def _renamed(name: str, patterns: dict[str, str]) -> str:
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def plain_copy(source: Checkpoint, quantized: Path, out: Path) -> Path:
    """The source in float32 with its matrices replaced by those that a quantized folder decodes to."""
    out.mkdir()
    (out / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    values = read_back(quantized, source)
    tensors = {name: source.tensor(name) for name in source.shard_of}
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for matrix in source.matrices:
        if matrix.tensor in values and matrix.index is not None:  # a stack that is kept whole
            continue
        place = tensors[matrix.tensor] if matrix.index is None else tensors[matrix.tensor][matrix.index]
        place = (place.T if matrix.transposed else place)[matrix.row_start :: matrix.row_step][: matrix.shape[0]]
        place.copy_(values[matrix.name])
    shapes = {info.name: info for tensors in read_shards(source.folder)[0].values() for info in tensors.values()}
    save_file(
        {name: tensor.reshape(shapes[name].shape).contiguous() for name, tensor in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    return out


@dataclass(frozen=True)
class Outcome:
    """What became of one family in one layout."""

    layout: str
    matrices: int
    found: int
    """Weights of the planned matrices in the checkpoint."""
    expected: int
    """The same, counted in the model's modules."""
    wide: int
    """Matrices that the plan quantizes and the output does not hold as blocks, or the loaded model not packed."""
    kept: frozenset[Role]
    """Roles of large matrices that stay in 16 bits."""
    difference: float
    """Largest difference of any logit to the model with the dequantized matrices."""
    change: float
    """Largest difference to the model before it was quantized."""


def outcome(model: Any, folder: Path, published: bool) -> Outcome:
    """Save, analyze, plan, quantize and load a model, the last by the plug-in and without it."""
    expected = planned_weights(model)
    source = open_checkpoint(save_layout(model, folder / "source", published))
    experts = source.planned
    request = resolve(PlanConfig(budget=Budget(bits=2.5), group_size=32, choices="2,3,4", method="alphaq"))
    plan = pipeline.make_plan(source, request, pipeline.measure_for_plan(source, request))
    pipeline.quantize(source, plan, folder / "out")
    plain = plain_copy(source, folder / "out", folder / "plain")
    stored = Output(folder / "out").stored
    quantized, packed = loaded_logits(folder / "out")
    answers = [quantized, *(loaded_logits(one)[0] for one in (plain, source.folder))]
    return Outcome(
        "fused" if any(matrix.index is not None for matrix in experts) else "one by one",
        len(experts),
        sum(matrix.parameters for matrix in experts),
        expected,
        sum(stored[name].dtype != "U8" or name not in packed for name in plan.choices),
        frozenset(one.role for one in source.matrices if one.name not in plan.choices and min(one.shape) >= 16),
        float((answers[0] - answers[1]).abs().max()),
        float((answers[0] - answers[2]).abs().max()),
    )


def logits(folder: Path) -> torch.Tensor:
    """Of a fixed row of tokens, float32, from the class that transformers has for a checkpoint."""
    return loaded_logits(folder)[0]


def loaded_logits(folder: Path) -> tuple[torch.Tensor, set[str]]:
    """The logits, and the names of the matrices that the loaded model holds packed."""
    from transformers import AutoConfig

    cls = model_class(AutoConfig.from_pretrained(folder))
    model, report = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"], sorted(report["missing_keys"])[:3]
    if hasattr(model, "hf_quantizer"):
        assert not report["unexpected_keys"], sorted(report["unexpected_keys"])[:3]
    torch.manual_seed(0)  # a diffusion model draws the words that it begins with
    with torch.no_grad():
        found = model.eval()(input_ids=torch.arange(3, 19)[None]).logits
    packed = (one.names for one in model.modules() if isinstance(one, PackedWeights))
    return found, {name for names in packed for row in names for name in row}
