"""Families that an engine is written for by tables: models of them, and every setting of their configs changed once.

What flips.py lists by hand is made here: whatever the family's class knows is changed in a way of its kind. A change
that the class refuses, or that no model can be built of, says nothing.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exported import cycled_plan
from safetensors.torch import save_file

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.weights import read_shards
from alphaq.engines.assumptions.tables import engine_table
from alphaq.engines.output import Output
from alphaq.engines.settings import require_settings
from alphaq.errors import ArchitectureError
from alphaq.evaluation.restored import restored_from
from families import FAMILIES, SMALL, config_of, logits, random_family, save_layout

EXACT = 1e-4
"""Relative to the largest logit: what sums in another order make of float32."""
TOKENS = list(range(3, 19))  # those of `families.logits`
MIXED = ("2g32", "3g32", "4g32", "5g32", "6g32", "8g32", "16")

FOUR = dict(num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"])

# By `model_type`; what each needs beside tests/families.py for MLX to run it, and for all of its parts to matter.
RUN: dict[str, dict[str, Any]] = {
    "afmoe": dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=6),
    "dbrx": {},
    "deepseek_v32": dict(index_n_heads=8),  # few of whose scores are equal
    "dots1": {},
    "exaone_moe": dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=6),
    "gemma4_text": dict(sliding_window=6),
    "glm4_moe_lite": {},
    "glm_moe_dsa": dict(index_n_heads=8),
    "granitemoehybrid": dict(tie_word_embeddings=True, shared_intermediate_size=96),
    "laguna": dict(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=6),
    "lfm2_moe": {},
    "longcat_flash": {},
    "mellum": dict(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=6),
    "minimax_m2": {},
    "mistral4": {},
    "nemotron_h": dict(sliding_window=None),
    "phimoe": dict(attention_bias=True, lm_head_bias=True, sliding_window=None),
    "mimo_v2_flash": dict(sliding_window=6, head_dim=48),
    "solar_open": {},
    "qwen3_5_moe": dict(text_config=FOUR),
    "qwen3_5_moe_text": FOUR,
    "qwen3_vl_moe": {},
    "kimi_k25": dict(tie_word_embeddings=False, text_config=dict(tie_word_embeddings=False, num_key_value_heads=4)),
    "mistral3": {},
    "gemma4": {},
}

# -- changes --------------------------------------------------------------------------------------

LENGTHS = {"num_hidden_layers", "num_layers", "n_layers", "max_position_embeddings", "vocab_size", "max_seq_len"}
"""What lists of other settings, or tokens, depend on."""
WORDS: dict[str, tuple[str, ...]] = {
    "hidden_act": ("gelu",),
    "hidden_activation": ("gelu",),
    "mlp_hidden_act": ("silu",),
    "mamba_hidden_act": ("gelu",),
    "scoring_func": ("softmax", "sigmoid"),
    "position_embedding_type": ("rope",),
    "topk_method": ("greedy", "group_limited_greedy"),
}
UNSET: dict[str, Any] = {
    "sliding_window": 4,
    "head_dim": 32,
    "final_logit_softcapping": 3.0,
    "moe_latent_size": 32,
    "use_bidirectional_attention": True,
    "position_embedding_type": "rope",
}
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
ROPES: tuple[dict[str, Any], ...] = (
    dict(rope_theta=100.0),
    dict(rope_type="linear", factor=4.0),
    YARN,
    YARN | dict(beta_fast=8, beta_slow=2),
    YARN | dict(attention_factor=2.0),
    YARN | dict(mscale=0.7, mscale_all_dim=0.7),
    YARN | dict(truncate=False),
    dict(
        rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16, factor=8.0
    ),
    dict(partial_rotary_factor=0.5),
)


@dataclass(frozen=True)
class Change:
    """One setting changed, with what must change along."""

    name: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        settings = self.settings.get("text_config", self.settings)
        return f"{self.name} = {json.dumps(settings[self.name], default=str)[:90]}"


def changes(model_type: str) -> Iterator[Change]:
    """Each setting of a family's class, changed once or in a few ways."""
    settings = config_of(model_type, **RUN.get(model_type, {})).to_dict()
    if isinstance(inner := settings.get("text_config"), dict):
        base = {**FAMILIES.get(model_type, {}), **RUN.get(model_type, {})}.get("text_config", {})
        for change in _of(inner):
            yield Change(change.name, {"text_config": base | change.settings})
    else:
        yield from _of(settings)


def _of(settings: dict[str, Any]) -> Iterator[Change]:
    nothing = engine_table("an engine of next year").common.neutral  # of what any engine computes
    for name, value in settings.items():
        if name == "rope_parameters" and isinstance(value, dict):
            yield from _ropes(value)
        elif name not in LENGTHS | nothing:
            yield from (Change(name, {name: other}) for other in _others(name, value))
    groups = {"num_experts", "num_local_experts", "n_routed_experts"} & settings.keys()
    if {"n_group", "topk_group"} <= settings.keys():
        yield Change("n_group", dict(n_group=4, topk_group=2) | dict.fromkeys(groups, 8))


def _ropes(value: dict[str, Any]) -> Iterator[Change]:
    nested = [key for key, part in value.items() if isinstance(part, dict)]
    for rope in ROPES:
        if not nested:
            yield Change("rope_parameters", {"rope_parameters": value | rope})
        for key in nested:
            yield Change("rope_parameters", {"rope_parameters": value | {key: value[key] | rope}})


def _others(name: str, value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (1, 3) if "per_tok" in name or name.endswith("topk") else (2 * value or 1,)
    elif isinstance(value, float):
        yield 1.7 * value + 0.3
    elif isinstance(value, str):
        yield from (word for word in WORDS.get(name, ()) if word != value)
    elif value is None and UNSET.get(name) is not None:
        yield UNSET[name]
    elif isinstance(value, list | tuple) and len(value) > 1:
        yield from _rotated(list(value))


def _rotated(value: list[Any]) -> Iterator[list[Any]]:
    turned = value[1:] + value[:1]
    if turned != value:
        yield turned
    elif isinstance(value[0], int | float) and not isinstance(value[0], bool):
        yield [2 * value[0], *value[1:]]


# -- running --------------------------------------------------------------------------------------


def model_of(model_type: str, sizes: Mapping[str, Any] = SMALL, **changed: Any) -> Any:
    """A random model in which every part matters, float32. bfloat16 holds its norms, also if one is added to them."""
    model = random_family(model_type, sizes, **{**RUN.get(model_type, {}), **changed})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias"):
                values.copy_(torch.randn(values.shape, generator=generator) / 4)
            elif "norm" in name and values.ndim == 1:
                values.add_(torch.randn(values.shape, generator=generator).div_(4).mul_(64).round_().div_(64))
            elif values.ndim >= 2 and values.dtype.is_floating_point and not name.endswith("inv_freq"):
                values.mul_(4)
    return model


@dataclass(frozen=True)
class InEngine:
    """An engine that runs what is written for it. compute: (folder, tokens) → logits [tokens, words]."""

    name: str
    compute: Callable[[Path, Sequence[int]], torch.Tensor]

    def difference(self, source: Path, scratch: Path, choices: tuple[str, ...], fixed: str | None = None) -> float:
        """Largest difference of logits between the engine with files of a checkpoint and transformers with what they
        stand for, relative to the largest logit. choices: of experts in turn; of all else too, unless that is fixed."""
        checkpoint = open_checkpoint(source)
        pipeline.quantize(checkpoint, cycled_plan(checkpoint, self.name, choices, fixed), scratch / "out")
        restored = restored_from(Output(scratch / "out"), checkpoint)
        (scratch / "restored").mkdir()
        shutil.copy(source / "config.json", scratch / "restored")
        shapes = {info.name: info.shape for infos in read_shards(source)[0].values() for info in infos.values()}
        values = {name: restored.tensor(name).reshape(shapes[name]).contiguous() for name in checkpoint.shard_of}
        values = {name: one.float() if one.is_floating_point() else one for name, one in values.items()}
        save_file(values, scratch / "restored" / "model.safetensors", {"format": "pt"})
        expected = logits(scratch / "restored")[0]
        return float((self.compute(scratch / "out", TOKENS) - expected).abs().max() / expected.abs().max())

    def wrong(self, scratch: Path, model_type: str, save: Callable[..., Path]) -> dict[str, float]:
        """Changed settings that the engine neither follows nor has refused, and by how much its logits differ.

        save: (folder, model type, changed settings) → a checkpoint. What the class itself refuses, or cannot run, is
        passed over; a wrapper's settings are those of what it wraps.
        """
        found = {}
        for number, change in enumerate(changes(model_type)):
            folder = scratch / str(number)
            folder.mkdir()
            if (difference := self._changed(folder, model_type, change, save)) >= EXACT:
                found[str(change)] = difference
        return found

    def _changed(self, folder: Path, model_type: str, change: Change, save: Callable[..., Path]) -> float:
        """0 for a change that is refused or cannot be."""
        try:
            source = save(folder / "source", model_type, **copy.deepcopy(change.settings))
            logits(source)
        except Exception:  # whatever a class does with a config that means nothing
            return 0.0
        try:
            require_settings(open_checkpoint(source), self.name)
        except ArchitectureError:
            return 0.0
        return self.difference(source, folder, ("8g32",), "16")


def saved(folder: Path, model_type: str, **changed: Any) -> Path:
    """A family's checkpoint in bf16, under the names of the hub."""
    return save_layout(model_of(model_type, **changed), folder, published=True)
