"""Models of every family that compressed-tensors files are written for: small ones that vLLM can run on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from families import FAMILIES, SMALL, random_family

# What vLLM's kernels of CPUs can do, and what leaves groups whole; SMALL's sides are odd on purpose.
SIZES: dict[str, Any] = SMALL | dict(
    hidden_size=128, d_model=128, intermediate_size=128, moe_intermediate_size=64, shared_expert_intermediate_size=64,
    expert_ffn_hidden_size=64, ffn_hidden_size=128, moe_shared_expert_intermediate_size=64, share_expert_dim=64,
    dense_intermediate_size=128, shared_experts_intermediate_size=64, moe_hidden_size=128, out_hidden_size=128,
    head_dim=32, global_head_dim=32, swa_head_dim=32, vocab_size=384, vocab_size_per_layer_input=384,
    num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8,
)  # fmt: skip
LATENT = dict(
    head_dim=64, q_lora_rank=64, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    num_key_value_heads=4,
)  # fmt: skip
GEMMA = FAMILIES["gemma4_text"] | dict(moe_intermediate_size=64, num_experts=8, sliding_window=6)
SECTIONS = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 3, 3])

# By `model_type`: what each needs beside SIZES and tests/families.py, for vLLM to run it and for all of its parts to
# matter.
VLLM_ALONE = {
    *("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
    *("qwen3_vl_moe", "gemma4_text", "hy_v3"),
}
"""Families of which transformers 5.23 leaves weights as it made them up when it loads files of compressed-tensors."""

RUN: dict[str, dict[str, Any]] = {
    "afmoe": dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=6),
    "axk1": LATENT,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=6),
    "flex_olmo": {},
    "gemma4_text": GEMMA,
    "glm4_moe": dict(head_dim=32),
    "glm4_moe_lite": LATENT,
    "glm4v_moe": dict(text_config=dict(head_dim=32, use_qk_norm=False, rope_parameters=SECTIONS)),
    "granitemoe": {},
    "granitemoe_swa": dict(
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=6,
        layer_rope_theta=[1e4, 1e2, 0.0],
        num_local_experts=6,
        shared_intermediate_size=64,
    ),
    "granitemoehybrid": dict(num_local_experts=7, mamba_d_head=64, shared_intermediate_size=64),
    "granitemoeshared": dict(shared_intermediate_size=64),
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "llama4_text": dict(num_experts_per_tok=1),
    "mellum": dict(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=6),
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_vl_moe": dict(text_config=dict(norm_topk_prob=True)),
    "solar_open": {},
}


def model_of(model_type: str, **changed: Any) -> Any:
    """A random model in which every part matters, float32. bfloat16 holds its norms, also if one is added to them."""
    model = random_family(model_type, SIZES, **{**FAMILIES.get(model_type, {}), **RUN.get(model_type, {}), **changed})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "sinks")):
                values.copy_(torch.randn(values.shape, generator=generator) / 4)
            elif "norm" in name and values.ndim == 1:
                values.add_(torch.randn(values.shape, generator=generator).div_(4).mul_(64).round_().div_(64))
            elif values.ndim >= 2 and values.dtype.is_floating_point and not name.endswith("inv_freq"):
                values.mul_(2)
    return model
