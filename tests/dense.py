"""Tiny random dense models of the families that other engines load, with settings that published models have."""

from __future__ import annotations

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
    "gemma2": dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=8),
    "gemma3_text": dict(
        head_dim=32, query_pre_attn_scalar=32, sliding_window=8, num_hidden_layers=7, rope_parameters=GEMMA3_ROPE
    ),
}
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip


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
