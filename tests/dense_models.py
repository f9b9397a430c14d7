"""Tiny random dense models of the families that other engines load, with settings that published models have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from runnable import VOCAB, byte_level, save_tokenizer

SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="default", rope_theta=1e5),
    sliding_attention=dict(rope_type="default", rope_theta=1e3),
)
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=None, head_dim=24),
    "qwen2": {},
    "qwen3": dict(head_dim=24),
    "gemma": dict(head_dim=32),
    "gemma2": dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
    "gemma3_text": dict(
        head_dim=32, query_pre_attn_scalar=32, sliding_window=8, num_hidden_layers=7, rope_parameters=GEMMA3_ROPE
    ),
    "granite": dict(attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0),
    "olmo2": {},
    "seed_oss": dict(head_dim=24),
    "smollm3": dict(num_hidden_layers=5),
}


def dense_model(family: str, **overrides: Any) -> Any:
    """A family's model in float32 whose every part matters: large weights, norms and biases that differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **DENSE[family], **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08).mul_(1 + torch.rand(parameter.shape[0], 1))
            else:
                parameter.normal_(1 if "norm" in name and "gemma" not in family else 0, 0.3)
    return model


def save_dense(folder: Path, family: str, **overrides: Any) -> Path:
    """The same as a bf16 folder with a tokenizer."""
    dense_model(family, **overrides).bfloat16().save_pretrained(folder)
    save_tokenizer(folder, byte_level(), add_bos_token=False)
    return folder


@dataclass(frozen=True)
class Flip:
    """A setting that is not the family's usual one, and the key by which an engine refuses it."""

    settings: dict[str, Any]
    refused: dict[str, str] = field(default_factory=dict)


def _refused(key: str, *engines: str) -> dict[str, str]:
    return dict.fromkeys(engines or ("llama.cpp", "mlx"), key)


ALL = ("llama.cpp", "mlx", "vllm")
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
EVERY = {
    "no-groups": Flip(dict(num_key_value_heads=4)),
    "epsilon": Flip(dict(rms_norm_eps=0.1)),
}
ROPE = {
    "base": Flip(dict(rope_parameters=dict(rope_type="default", rope_theta=100.0))),
    "linear": Flip(dict(rope_parameters=LINEAR)),
    "yarn": Flip(dict(rope_parameters=YARN)),
    "yarn-factor": Flip(
        dict(rope_parameters=YARN | dict(attention_factor=1.7)), _refused("rope_parameters.attention_factor", *ALL)
    ),
    "yarn-untruncated": Flip(
        dict(rope_parameters=YARN | dict(truncate=False)), _refused("rope_parameters.truncate", *ALL)
    ),
    "yarn-betas": Flip(
        dict(rope_parameters=YARN | dict(beta_fast=8.0, beta_slow=2.0)),
        _refused("rope_parameters.beta_fast", "llama.cpp"),
    ),
    "yarn-mscale": Flip(
        dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.5)), _refused("rope_parameters.mscale", *ALL)
    ),
    "dynamic": Flip(
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
        _refused("rope_parameters.rope_type", *ALL),
    ),
    "act": Flip(dict(hidden_act="gelu"), _refused("hidden_act", *ALL)),
    "tied": Flip(dict(tie_word_embeddings=True)),
}
WINDOWS = {
    "windows": Flip(
        dict(use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"]),
        {"llama.cpp": "use_sliding_window", "mlx": "layer_types", "vllm": "layer_types"},
    ),
}
GEMMA = EVERY | {
    "act": Flip(dict(hidden_activation="gelu"), _refused("hidden_activation", *ALL)),
    "biases": Flip(dict(attention_bias=True), _refused("attention_bias")),
    "both-ways": Flip(dict(use_bidirectional_attention=True), _refused("use_bidirectional_attention", *ALL)),
}
UNTIED = Flip(dict(tie_word_embeddings=False), _refused("tie_word_embeddings", *ALL))
FLIPS: dict[str, dict[str, Flip]] = {
    "llama": EVERY | ROPE | {
        "llama3": Flip(dict(rope_parameters=LLAMA3)),
        "heads": Flip(dict(head_dim=24)),
        "attention-biases": Flip(dict(attention_bias=True)),
        "mlp-biases": Flip(dict(mlp_bias=True)),
    },
    "mistral": EVERY | ROPE | {
        "llama3": Flip(dict(rope_parameters=LLAMA3)),
        "window": Flip(dict(sliding_window=8), _refused("sliding_window")),
        "wide-window": Flip(dict(sliding_window=64)),
    },
    "qwen2": EVERY | ROPE | WINDOWS | {
        "llama3": Flip(dict(rope_parameters=LLAMA3), {"llama.cpp": "rope_parameters.rope_type"}),
        "heads": Flip(dict(head_dim=24), _refused("head_dim", *ALL)),
    },
    "qwen3": EVERY | ROPE | WINDOWS | {
        "llama3": Flip(dict(rope_parameters=LLAMA3), {"llama.cpp": "rope_parameters.rope_type"}),
        "biases": Flip(dict(attention_bias=True), _refused("attention_bias")),
    },
    "gemma": EVERY | {
        "older-act": Flip(dict(hidden_act="gelu")),
        "linear": Flip(dict(rope_parameters=LINEAR), _refused("rope_parameters.rope_type", "mlx", "vllm")),
        "biases": Flip(dict(attention_bias=True), _refused("attention_bias", *ALL)),
        "untied": UNTIED,
    },
    "gemma2": GEMMA | {
        "untied": UNTIED,
        "scale": Flip(dict(query_pre_attn_scalar=16), {"llama.cpp": "query_pre_attn_scalar"}),
        "caps": Flip(dict(attn_logit_softcapping=3.0, final_logit_softcapping=2.0)),
        "no-cap": Flip(dict(attn_logit_softcapping=None), _refused("attn_logit_softcapping")),
        "no-final-cap": Flip(dict(final_logit_softcapping=None), _refused("final_logit_softcapping")),
        "window": Flip(dict(sliding_window=8), {"mlx": "sliding_window"}),
        "layers": Flip(dict(layer_types=["full_attention"] * 2), {"llama.cpp": "layer_types"}),
        "27B": Flip(dict(num_hidden_layers=46, query_pre_attn_scalar=16)),
    },
    "gemma3_text": GEMMA | {
        "untied": Flip(dict(tie_word_embeddings=False)),
        "scale": Flip(dict(query_pre_attn_scalar=16), {"llama.cpp": "query_pre_attn_scalar"}),
        "cap": Flip(dict(attn_logit_softcapping=3.0), _refused("attn_logit_softcapping", *ALL)),
        "final-cap": Flip(dict(final_logit_softcapping=2.0), {"mlx": "final_logit_softcapping"}),
        "window": Flip(dict(sliding_window=20)),
        "layers": Flip(dict(layer_types=["full_attention"] * 7), _refused("layer_types")),
        "linear": Flip(dict(rope_parameters=GEMMA3_ROPE | dict(full_attention=LINEAR))),
        "linear-windows": Flip(
            dict(rope_parameters=GEMMA3_ROPE | dict(sliding_attention=LINEAR)),
            _refused("rope_parameters.sliding_attention.rope_type", *ALL),
        ),
        "27B": Flip(dict(num_hidden_layers=62, query_pre_attn_scalar=16)),
    },
    "granite": EVERY | ROPE | {
        "scales": Flip(dict(attention_multiplier=0.1, embedding_multiplier=2.0, residual_multiplier=0.9)),
        "logits": Flip(dict(logits_scaling=8.0)),
    },
    "olmo2": EVERY | ROPE,
    "seed_oss": EVERY | ROPE | {"no-biases": Flip(dict(attention_bias=False))},
    "smollm3": EVERY | ROPE | {
        "all-rope": Flip(dict(no_rope_layers=[1] * 5), _refused("no_rope_layers", "llama.cpp")),
        "untied": Flip(dict(tie_word_embeddings=False)),
    },
}  # fmt: skip
