"""Tiny models that llama.cpp's converter takes: what each family needs beside families.SMALL and FAMILIES.

The converter reads config.json and tensors as they are published, llama.cpp takes some settings for granted, and
transformers writes neither. Where it does not, the settings of published checkpoints stand here, in small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from families import EXPERTS, FAMILIES, GEMMA, HEADS, MIXED, MROPE, QSA, SMALL, SPARSE, random_family, save_layout
from runnable import VOCAB, byte_level, save_llama_bpe, save_sentencepiece, save_tokenizer

# Rows of whole blocks, some of 256 weights.
LARGER = SMALL | dict(
    vocab_size=VOCAB, hidden_size=256, d_model=256, expert_ffn_hidden_size=64, moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64, share_expert_dim=64, shared_expert_intermediate_size=64,
    shared_experts_intermediate_size=64, hidden_size_per_layer_input=32, linear_head_dim=32,
    qk_nope_head_dim=32,
)  # fmt: skip
ADDED_TOKENS = (
    "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>", "<unk>",
    "<|startoftext|>", "<|endofassistant|>",
)  # fmt: skip
NOT_FOLDED = dict(model_type="as published")
"""The converter lets transformers read config.json, which folds such settings into others; a type that it does not
know is read as it stands."""


def save_byte_level(folder: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(list(ADDED_TOKENS))
    save_tokenizer(folder, tokenizer, add_bos_token=False)


def save_vocabulary(folder: Path) -> None:
    """A tokenizer without tokenizer.json, since beside one transformers forgets that a sequence begins with a token."""
    byte_level().model.save(str(folder))
    config = dict(tokenizer_class="GPT2Tokenizer", bos_token="<|end|>", eos_token="<|end|>", add_bos_token=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | dict(unk_token="<|end|>")))


@dataclass(frozen=True)
class Needs:
    """What one family needs.

    sizes: instead of LARGER's, in every config of the model. settings: of the family's own config. published: keys of
    config.json and of the objects in it, None to remove one; under `architectures` the hub's name of a class. flags:
    of the converter. left_out: names of tensors that are not published. transposed: of those whose matrices are.
    packed: of those in MXFP4.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    left_out: str = "$^"
    transposed: str = "$^"
    packed: str = "$^"
    tokenizer: Callable[[Path], None] = save_byte_level


INDEXER = dict(index_head_dim=64)  # llama.cpp turns its keys by a Hadamard matrix of 64 rows
NO_MLA = dict(qk_rope_head_dim=0, first_k_dense_replace=1)
SIGMOID = dict(scoring_func="sigmoid")
NO_MTP = ("--no-mtp",)  # transformers saves no block that predicts further tokens
LINEAR = dict(num_heads=4, head_dim=32, short_conv_kernel_size=4)
LOW_RANK = dict(hc_lowrank=32)
WHOLE_ROWS = dict(moe_intermediate_size=64)
SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
CHUNKED = dict(num_hidden_layers=4)  # llama.cpp insists on a layer without rotary embeddings, which every fourth one is
DOTS3 = dict(
    swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=32, swa_kv_lora_rank=32, swa_head_dim=48,
    swa_qk_nope_head_dim=32, swa_qk_rope_head_dim=16, swa_v_head_dim=16,
)  # fmt: skip
MINIMAX_M3 = dict(
    sparse_num_index_heads=2, sparse_index_dim=16, sparse_topk_blocks=16, sparse_block_size=128, sparse_local_block=1
)  # fmt: skip
MINIMAX = {
    f"layernorm_{part}_{name}": value
    for part in ("full_attention", "linear_attention", "mlp")
    for name, value in (("alpha", 3.5565588200778455), ("beta", 1.0))
}
HYBRID = ["linear_attention", "moe", "full_attention", "moe"]
TEXT_MROPE = dict(text_config=dict(rope_parameters=MROPE | dict(partial_rotary_factor=1.0, mrope_section=[4, 2, 2])))

NEEDS: dict[str, Needs] = {
    "bailing_hybrid": Needs(
        settings=HEADS | dict(layer_types=["linear_attention", "linear_attention", "full_attention"]),
        published=NOT_FOLDED
        | SIGMOID
        | dict(
            architectures=["BailingMoeV3ForCausalLM"], layer_group_size=3, no_kda_lora=True,
            gated_attention_proj_granularity_type="head_wise", moe_shared_expert_intermediate_size=64,
            norm_topk_prob=True, head_dim=32,
        ),
    ),
    "deepseek_ocr2": Needs(
        HEADS,
        published=NO_MLA
        | dict(
            architectures=["DeepseekOCR2ForCausalLM"], text_config=dict(architectures=["DeepseekV2ForCausalLM"]),
        ),
    ),
    "deepseek_v32": Needs(INDEXER, published=SIGMOID, tokenizer=save_vocabulary),
    "deepseek_v4": Needs(
        INDEXER | dict(head_dim=128, num_key_value_heads=1, o_groups=2),  # heads as wide as the indexer's end llama.cpp
        dict(qk_rope_head_dim=32),
        dict(num_hash_layers=1, compress_ratios=[128, 4, 4], qk_rope_head_dim=32, rope_theta=1e4),
        packed=r"\.experts\.\d+\.w[123]\.weight$",
    ),
    "dots1": Needs(settings=HEADS, published=SIGMOID),
    "dots3_note_text": Needs(
        INDEXER,
        HEADS | DOTS3 | dict(layer_types=["indexed_attention", "sliding_attention", "indexed_attention"]),
        NOT_FOLDED | SIGMOID | DOTS3 | dict(sliding_window_size=32, first_k_dense_replace=1),
    ),
    "ernie4_5_moe": Needs(dict(intermediate_size=128), tokenizer=save_sentencepiece),
    "exaone_moe": Needs(published=SIGMOID),
    "gemma2": Needs(tokenizer=save_sentencepiece),
    "gemma4": Needs(settings=dict(text_config=GEMMA | WHOLE_ROWS), tokenizer=save_llama_bpe),
    "gemma4_text": Needs(settings=WHOLE_ROWS, tokenizer=save_llama_bpe),
    "glm4_moe_lite": Needs(published=dict(first_k_dense_replace=1)),
    "glm5_next": Needs(
        INDEXER,
        published=dict(
            linear_attn_config=LINEAR | dict(gate_lower_bound=-5.0), mla_use_nope=True, first_k_dense_replace=1
        ),
    ),
    "glm_moe_dsa": Needs(INDEXER),
    "granitemoeshared": Needs(settings=dict(shared_intermediate_size=64)),
    "granitemoehybrid": Needs(
        dict(mamba_d_head=128, vocab_size=344), published=NOT_FOLDED | dict(layer_types=["mamba", "attention", "mamba"])
    ),
    "hunyuan_v1_moe": Needs(
        published=dict(moe_intermediate_size=[96] * 3, moe_topk=[2] * 3, num_shared_expert=[1] * 3)
    ),
    "hy_v4": Needs(INDEXER),
    "internvl": Needs(published=dict(text_config=dict(architectures=["Qwen3MoeForCausalLM"]))),
    "jamba": Needs(tokenizer=save_sentencepiece),
    "kimi_k25": Needs(published=dict(architectures=["KimiK25ForConditionalGeneration"])),
    "kimi_linear": Needs(
        settings=dict(q_lora_rank=None),
        published=dict(
            linear_attn_config=LINEAR | dict(full_attn_layers=[2], kda_layers=[1, 3]), num_experts=EXPERTS,
            first_k_dense_replace=1, moe_router_activation_func="sigmoid",
        ),
    ),
    "llama4": Needs(CHUNKED),
    "llama4_text": Needs(CHUNKED),
    "mellum": Needs(settings=dict(layer_types=SLIDING)),
    "mimo_v2_flash": Needs(
        settings=dict(layer_types=SLIDING),
        published=NOT_FOLDED
        | SIGMOID
        | dict(
            swa_head_dim=16, swa_v_head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=4,
            topk_method="noaux_tc", hybrid_layer_pattern=[0, 1, 1], rope_parameters=None, partial_rotary_factor=0.5,
        ),
    ),
    "minimax": Needs(
        dict(num_hidden_layers=8),  # llama.cpp takes every eighth one to look at everything
        dict(layer_types=["linear_attention"] * 7 + ["full_attention"]),
        published=MINIMAX | dict(architectures=["MiniMaxM1ForCausalLM"], rotary_dim=16),
        left_out=r"_decay$|\.slope_rate$",
    ),
    "minimax_m2": Needs(published=SIGMOID | dict(rotary_dim=8)),
    "minimax_m3_vl": Needs(
        dict(shared_intermediate_size=96, rotary_dim=8),
        dict(text_config=SPARSE | dict(layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"])),
        SIGMOID | dict(n_shared_experts=1, sparse_attention_config=MINIMAX_M3, moe_layer_freq=[0, 1, 1]),
    ),
    "mistral3": Needs(settings=dict(text_config=HEADS | dict(model_type="mistral4", head_dim=48))),
    "nemotron_h": Needs(dict(vocab_size=344), dict(layer_types=HYBRID)),
    "olmoe": Needs(settings=HEADS),
    "phimoe": Needs(
        settings=dict(attention_bias=True, lm_head_bias=True),
        published=dict(architectures=["PhiMoEForCausalLM"], original_max_position_embeddings=256),
        tokenizer=save_sentencepiece,
    ),
    "qwen3_5_moe": Needs(settings=dict(text_config=MIXED | dict(rope_parameters=MROPE)), flags=NO_MTP),
    "qwen3_5_moe_text": Needs(settings=dict(rope_parameters=MROPE), flags=NO_MTP),
    "qwen3_next": Needs(flags=NO_MTP),
    "qwen3_omni_moe_thinker": Needs(
        settings=TEXT_MROPE, published=dict(architectures=["Qwen3OmniMoeForConditionalGeneration"])
    ),
    "qwen3_vl_moe": Needs(settings=TEXT_MROPE, transposed=r"\.experts\.(gate_up|down)_proj$"),
    "qwen4_exp": Needs(LOW_RANK, settings=dict(text_config=QSA | dict(rope_parameters=MROPE))),
    "qwen4_exp_text": Needs(LOW_RANK, settings=dict(rope_parameters=MROPE)),
    "step3p7": Needs(
        settings=dict(text_config=SPARSE | dict(layer_types=SLIDING)),
        published=dict(
            num_attention_groups=2, moe_num_experts=EXPERTS, moe_top_k=2, partial_rotary_factors=[0.5, 1.0, 1.0],
            moe_layers_enum="1,2", attention_other_setting=dict(num_attention_heads=4, num_attention_groups=2),
        ),
    ),
    "unlimited_ocr": Needs(
        HEADS,
        dict(text_config=SPARSE),
        NO_MLA | dict(architectures=["UnlimitedOCRForCausalLM"]),
    ),
}  # fmt: skip


def needs_of(family: str) -> Needs:
    """What a family needs; nothing, if it is not in the table."""
    return NEEDS.get(family, Needs())


def published_class(family: str, name: str) -> str:
    """The name that the hub gives a family's class of transformers, or the class of words inside it."""
    published = needs_of(family).published
    return str(published.get("text_config", published).get("architectures", [name])[0])


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with changes to it and to the objects in it; None removes a key."""
    inner = {
        key: merged(config.get(key) or {}, value) if isinstance(value, Mapping) else value
        for key, value in changes.items()
    }
    return {key: value for key, value in {**config, **inner}.items() if value is not None or key not in changes}


def save(family: str, folder: Path) -> Path:
    """A tiny random model of a family as it would be published, with a tokenizer. Raises what transformers does."""
    needs = needs_of(family)
    model = random_family(family, LARGER | needs.sizes, **needs.settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    save_layout(model, folder, published=True)
    needs.tokenizer(folder)
    config = merged(json.loads((folder / "config.json").read_text()), needs.published)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: one.mT.contiguous() if re.search(needs.transposed, name) else one
        for name, one in load_file(folder / "model.safetensors").items()
        if not re.search(needs.left_out, name)
    }
    write_index(folder, packed(tensors, needs.packed))
    return folder


def write_index(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The tensors, and the list of them that published models of many files have."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    names = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))


def packed(tensors: dict[str, torch.Tensor], pattern: str) -> dict[str, torch.Tensor]:
    """The tensors, those of some names with random codes of MXFP4: a byte for two weights and a scale for 32."""
    draw = torch.Generator().manual_seed(0)
    coded = {name: one.shape for name, one in tensors.items() if re.search(pattern, name)}
    codes = {
        name: torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=draw)
        for name, (rows, columns) in coded.items()
    }
    scales = {
        name.removesuffix("weight") + "scale": torch.full((rows, columns // 32), 122, dtype=torch.uint8)
        for name, (rows, columns) in coded.items()
    }
    return {**tensors, **codes, **scales}


assert NEEDS.keys() <= FAMILIES.keys()
