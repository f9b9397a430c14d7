"""Every setting of a family's config that changes what it computes, changed once: does the engine follow?

A tiny random model with the setting is written for an engine with little loss. Either it is refused and the setting is
named, or the engine's logits are those of transformers with the restored weights. `scripts/settings_table.py` makes
docs/engines/settings.md of the same flips.
"""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exported import cycled_plan, logits_of
from safetensors.torch import save_file

from alphaq import pipeline
from alphaq.checkpoint.gguf.format import layout, read_gguf
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.assumptions.tables import engine_table
from alphaq.engines.output import Output
from alphaq.engines.running import run_in_transformers
from alphaq.engines.settings import require_settings
from alphaq.errors import ArchitectureError
from alphaq.evaluation.restored import restored_from
from conftest import COMMON, random_model
from runnable import VOCAB, byte_level, save_tokenizer

TOKENS = [(7 * number + number // 3) % 300 for number in range(48)]
ENGINES = ("llama.cpp", "mlx", "vllm", "gptqmodel", "native")

# What every engine can run of a family: flips change it.
BASE: dict[str, dict[str, Any]] = {
    "mixtral": dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    "qwen2_moe": {},
    "qwen3_moe": dict(mlp_only_layers=[], norm_topk_prob=True),
    "olmoe": dict(num_key_value_heads=4),
    "deepseek_v2": dict(
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=4.0, mscale=0.7, mscale_all_dim=0.7, beta_fast=32, beta_slow=1,
            original_max_position_embeddings=16,
        )
    ),
    "deepseek_v3": {},
    "glm4_moe": {},
    "granitemoe": {},
}  # fmt: skip

BASE_ROPE = dict(rope_type="default", rope_theta=1e4)
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16, factor=8.0)
LONG = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=16, factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
ROPES: dict[str, dict[str, Any]] = {
    "rope_theta": dict(rope_theta=100.0),
    "rope linear": dict(rope_type="linear", factor=4.0),
    "rope dynamic": dict(rope_type="dynamic", factor=4.0),
    "rope yarn": YARN,
    "rope yarn, beta_fast": YARN | dict(beta_fast=8, beta_slow=2),
    "rope yarn, attention_factor": YARN | dict(attention_factor=2.0),
    "rope yarn, mscale": YARN | dict(mscale=0.7, mscale_all_dim=0.7),
    "rope yarn, mscale alone": YARN | dict(mscale_all_dim=0.7),
    "rope yarn, truncate": YARN | dict(truncate=False),
    "rope llama3": dict(rope_type="llama3", **LLAMA3),
    "rope longrope": dict(rope_type="longrope", **LONG),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5),
}
USUAL: dict[str, dict[str, Any]] = {
    "hidden_act": dict(hidden_act="gelu"),
    "rms_norm_eps": dict(rms_norm_eps=0.3),
    "num_key_value_heads": dict(num_key_value_heads=1),
    "num_experts_per_tok": dict(num_experts_per_tok=3),
    "one expert per token": dict(num_experts_per_tok=1),
    "tie_word_embeddings": dict(tie_word_embeddings=True),
    **{name: dict(rope_parameters=BASE_ROPE | rope) for name, rope in ROPES.items()},
    "rope dynamic": dict(rope_parameters=BASE_ROPE | ROPES["rope dynamic"], max_position_embeddings=32),
}
WINDOW = dict(sliding_window=4, use_sliding_window=True, max_window_layers=2)
LATENT: dict[str, dict[str, Any]] = {
    "attention_bias": dict(attention_bias=True),
    "q_lora_rank": dict(q_lora_rank=None),
    "v_head_dim": dict(v_head_dim=32),
    "qk_nope_head_dim": dict(qk_nope_head_dim=32),
    "qk_rope_head_dim": dict(qk_rope_head_dim=8),
    "routed_scaling_factor": dict(routed_scaling_factor=1.7),
    "n_shared_experts": dict(n_shared_experts=2),
    "first_k_dense_replace": dict(first_k_dense_replace=2),
    "n_group": dict(n_routed_experts=8, n_group=4, topk_group=2),
}
FLIPS: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": USUAL | {"head_dim": dict(head_dim=32), "sliding_window": dict(sliding_window=4)},
    "qwen2_moe": USUAL
    | {
        "qkv_bias": dict(qkv_bias=False),
        "norm_topk_prob": dict(norm_topk_prob=True),
        "decoder_sparse_step": dict(decoder_sparse_step=2),
        "mlp_only_layers": dict(mlp_only_layers=[1]),
        "use_sliding_window": WINDOW,
        "head_dim": dict(head_dim=32),
        "layer_types": dict(layer_types=["full_attention", "sliding_attention", "full_attention"], **WINDOW),
    },
    "qwen3_moe": USUAL
    | {
        "attention_bias": dict(attention_bias=True),
        "norm_topk_prob": dict(norm_topk_prob=False),
        "decoder_sparse_step": dict(decoder_sparse_step=2),
        "mlp_only_layers": dict(mlp_only_layers=[1]),
        "use_sliding_window": WINDOW,
        "head_dim": dict(head_dim=32),
    },
    "olmoe": USUAL
    | {
        "attention_bias": dict(attention_bias=True),
        "norm_topk_prob": dict(norm_topk_prob=True),
        "clip_qkv": dict(clip_qkv=0.05),
    },
    "deepseek_v2": USUAL
    | LATENT
    | {
        "norm_topk_prob": dict(norm_topk_prob=True),
        "n_group without its method": LATENT["n_group"],
        "topk_method": dict(topk_method="group_limited_greedy", **LATENT["n_group"]),
        "mlp_bias": dict(mlp_bias=True),
    },
    "deepseek_v3": USUAL
    | LATENT
    | {"norm_topk_prob": dict(norm_topk_prob=False), "rope_interleave": dict(rope_interleave=False)},
    "glm4_moe": USUAL
    | {
        **{name: LATENT[name] for name in ("attention_bias", "routed_scaling_factor", "n_shared_experts")},
        **{name: LATENT[name] for name in ("first_k_dense_replace", "n_group")},
        "head_dim": dict(head_dim=32),
        "norm_topk_prob": dict(norm_topk_prob=False),
        "partial_rotary_factor": dict(rope_parameters=BASE_ROPE | dict(partial_rotary_factor=0.25)),
        "use_qk_norm": dict(use_qk_norm=True),
    },
    "granitemoe": USUAL
    | {
        "attention_bias": dict(attention_bias=True),
        "attention_multiplier": dict(attention_multiplier=0.5),
        "embedding_multiplier": dict(embedding_multiplier=3.0),
        "logits_scaling": dict(logits_scaling=2.0),
        "residual_multiplier": dict(residual_multiplier=0.5),
    },
}
del FLIPS["glm4_moe"]["rope longrope"]  # whose factors are for a whole head
for _family in ("deepseek_v2", "deepseek_v3"):
    del FLIPS[_family]["num_key_value_heads"]  # of latent attention: as many as heads
del FLIPS["deepseek_v2"]["n_group"]


def engines_of(family: str) -> list[str]:
    """The engines that a family is written for from its own folder."""
    return [engine for engine in ENGINES if engine == "native" or family in engine_table(engine).families]


@dataclass(frozen=True)
class Answers:
    """Logits [tokens, words] after the same tokens, float32."""

    engine: torch.Tensor
    transformers: torch.Tensor

    @property
    def difference(self) -> float:
        """Largest difference, relative to the largest logit."""
        return float((self.engine - self.transformers).abs().max() / self.transformers.abs().max())


def flipped_model(family: str, flip: str | None, **sizes: Any) -> Any:
    """A random model in which every part matters, float32."""
    overrides = copy.deepcopy({**BASE[family], **sizes, **(FLIPS[family][flip] if flip else {})})  # classes add to them
    head = sizes.get("head_dim", sizes.get("hidden_size", COMMON["hidden_size"]) // COMMON["num_attention_heads"])
    for name in overrides.get("rope_parameters", {}).keys() & {"short_factor", "long_factor"}:
        overrides["rope_parameters"][name] = overrides["rope_parameters"][name][:1] * (head // 2)
    model = random_model(family, vocab_size=VOCAB, **overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "e_score_correction_bias")):
                values.copy_(torch.randn(values.shape, generator=generator) / 2)
            elif "norm" in name:
                values.copy_(1 + torch.randn(values.shape, generator=generator) / 2)
            elif values.ndim >= 2 and not name.endswith("inv_freq"):
                values.mul_(4)
    return model


def save_flipped(folder: Path, family: str, flip: str | None, **sizes: Any) -> Path:
    """Its checkpoint in bf16, with a tokenizer that llama.cpp knows."""
    flipped_model(family, flip, **sizes).bfloat16().save_pretrained(folder, save_original_format=True)
    save_tokenizer(folder, byte_level(), add_bos_token=False)
    return folder


def refusal(folder: Path, engine: str) -> str | None:
    """What the engine's files are refused for, or None."""
    try:
        require_settings(open_checkpoint(folder), engine)
    except ArchitectureError as error:
        return str(error)
    return None


def named_setting(message: str) -> str:
    """The setting that a refusal names."""
    found = re.match(r"config\.json: ([\w.]+) is ", message)
    assert found is not None, message
    return found[1]


# -- running --------------------------------------------------------------------------------------

CHOICE = {"llama.cpp": "Q8_0", "mlx": "8g32", "vllm": "8g32s", "gptqmodel": "8g32", "native": "8g32"}
INSTALLED = {"llama.cpp": "xllamacpp", "mlx": "mlx_lm", "vllm": "compressed_tensors", "gptqmodel": "gptqmodel"}


def answers(folder: Path, engine: str, scratch: Path) -> Answers:
    """What an engine answers with a checkpoint's experts at eight bits, and transformers with the restored weights.

    The rest keeps its 16 bits. llama.cpp is given the restored weights in float32: it would round what it multiplies
    with others.
    """
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(folder)
    plan = cycled_plan(source, engine, (CHOICE[engine],), "16")
    pipeline.quantize(source, plan, scratch / "out")
    output = Output(scratch / "out")
    restored = restored_from(output, source)
    (scratch / "restored").mkdir()
    shutil.copyfile(folder / "config.json", scratch / "restored" / "config.json")
    values = {name: restored.tensor(name).float().contiguous() for name in source.shard_of}
    save_file(values, scratch / "restored" / "model.safetensors", {"format": "pt"})
    # What compressed-tensors decompresses is rounded to the model's own type.
    dtype = torch.bfloat16 if engine == "vllm" else torch.float32
    expected = AutoModelForCausalLM.from_pretrained(scratch / "restored", dtype=dtype).eval()
    if engine == "llama.cpp":
        in_float32(scratch / "out" / "model.gguf")
    run = output.profile.writer.run
    assert run is not None
    if engine == "vllm":
        found = run_in_transformers(scratch / "out", TOKENS, dtype)
    else:
        found = run.logits(scratch / "out", TOKENS)
    return Answers(found[:, :VOCAB], logits_of(expected, TOKENS)[:, :VOCAB])


def in_float32(path: Path) -> None:
    """The same file with every weight as the number that it stands for."""
    import gguf

    tensors = {
        one.name: np.ascontiguousarray(gguf.quants.dequantize(one.data, one.tensor_type).astype(np.float32))
        for one in gguf.GGUFReader(path).tensors
    }
    header, places, nbytes = layout(
        read_gguf(path).metadata, {name: ("F32", one.shape) for name, one in tensors.items()}
    )
    data = np.zeros(nbytes, np.uint8)
    data[: len(header)] = np.frombuffer(header, np.uint8)
    for name, place in places.items():
        data[place.begin : place.end] = tensors[name].reshape(-1).view(np.uint8)
    path.write_bytes(data.tobytes())
