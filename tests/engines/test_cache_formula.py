"""What llama.cpp keeps of the past, by its own report, against a formula of every kind of cache.

A cell holds one token of one sequence, in a layer

    2·heads·(key + value) bytes in 16 bits,   or 2·(rank + rotary) where attention is latent,

and there are as many cells as tokens, but of a window of w no more than w and a batch of 512, in whole 256. A state
takes the same for any number of tokens: 4·((kernel − 1)·channels + inner·state) bytes for each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.nouns.serving import Serving
from alphaq.planning.memory import memory_of
from llama_converter import CONVERTER, MISSING, convert
from runnable import save_runnable

pytest.importorskip("xllamacpp")
MIB = 2**20
TOKENS, SEQUENCES = 2048, 64  # so many sequences that states show in a report of two digits
HALF, WHOLE = 2, 4
Facts = Mapping[str, Any]
Layer = Callable[[Facts, int], float]


def heads(facts: Facts, layer: int) -> int:
    found = facts["attention.head_count_kv"]
    return int(found[layer] if isinstance(found, Sequence) else found)


def width(facts: Facts, key: str, swa: str) -> int:
    found = facts.get(f"{key}{swa}", facts.get(key))
    return int(found if found is not None else facts["embedding_length"] // facts["attention.head_count"])


def grouped(facts: Facts, layer: int, cells: int = TOKENS, swa: str = "") -> float:
    return HALF * heads(facts, layer) * sum(width(facts, f"attention.{one}_length", swa) for one in KEY_VALUE) * cells


def latent(facts: Facts, layer: int) -> float:
    return HALF * (facts["attention.kv_lora_rank"] + facts["rope.dimension_count"]) * TOKENS


def indexed(facts: Facts, layer: int) -> float:
    return latent(facts, layer) + HALF * facts["attention.indexer.key_length"] * TOKENS


def window(facts: Facts, layer: int) -> float:
    return grouped(facts, layer, min(TOKENS, 256 * math.ceil((facts["attention.sliding_window"] + 512) / 256)), "_swa")


def compressed(facts: Facts, layer: int) -> float:
    """DeepSeek V4: a window of all, one cell for some tokens (256 at least), and half-finished ones in 32 bits."""
    head, ratio = facts["attention.key_length"], facts["attention.compress_ratios"][layer]
    kept = HALF * head * (768 + max(256, TOKENS // ratio))
    if ratio == 128:
        return kept + 2 * WHOLE * ratio * head
    index = facts["attention.indexer.key_length"]
    return kept + HALF * index * TOKENS // ratio + 2 * WHOLE * 2 * ratio * 2 * (head + index)


def state(facts: Facts, layer: int) -> float:
    inner, wide = facts["ssm.inner_size"], facts["ssm.state_size"]
    channels = inner + 2 * facts.get("ssm.group_count", 0) * wide
    return WHOLE * ((facts["ssm.conv_kernel"] - 1) * channels + inner * wide)


def delta(facts: Facts, layer: int) -> float:
    width, several = facts["kda.head_dim"], facts["attention.head_count"]
    return WHOLE * ((facts["ssm.conv_kernel"] - 1) * 3 * several * width + several * width**2)


def convolution(facts: Facts, layer: int) -> float:
    return WHOLE * (facts["shortconv.l_cache"] - 1) * facts["embedding_length"]


def lightning(facts: Facts, layer: int) -> float:
    return WHOLE * facts["attention.head_count"] * facts["attention.key_length"] ** 2


def nothing(facts: Facts, layer: int) -> float:
    return 0.0


KEY_VALUE = ("key", "value")
FAMILIES: dict[str, tuple[Layer, ...]] = {
    "gpt_oss": (window, grouped, window),
    "gemma4_text": (window, grouped),
    "llama4_text": (grouped,) * 4,  # chunks of 8,192 tokens, more than are asked for
    "mimo_v2_flash": (grouped, window, window),
    "step3p7": (grouped, window, window),
    "exaone_moe": (window,) * 3,
    "deepseek_v32": (indexed,) * 3,
    "deepseek_v4": (compressed,) * 3,
    "kimi_linear": (delta, latent, delta),
    "qwen3_next": (state, grouped, state),
    "jamba": (state, grouped, state, grouped),
    "nemotron_h": (state, nothing, grouped, nothing),
    "granitemoehybrid": (state, grouped, state),
    "lfm2_moe": (convolution, grouped, convolution),
    "minimax": (lightning,) * 7 + (grouped,),
}


def compare(source: Path, facts: Facts, layers: Sequence[Layer]) -> None:
    asked = Serving(memory_bytes=2**40, context=TOKENS, parallel=SEQUENCES)
    told = memory_of(open_checkpoint(source, quantized=source.is_file()), "llama.cpp", asked).kept.cache_bytes
    expected = SEQUENCES * sum(one(facts, number) for number, one in enumerate(layers))
    assert told == pytest.approx(expected, rel=0.001, abs=0.05 * MIB)
    assert expected > MIB


def facts_of(path: Path) -> Facts:
    metadata = read_gguf(path).metadata
    start = f"{metadata['general.architecture'].value}."
    return {key.removeprefix(start): value.value for key, value in metadata.items() if key.startswith(start)}


def test_a_cell_of_grouped_heads_holds_their_keys_and_values(tmp_path: Path) -> None:
    facts = {"attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16}
    compare(save_runnable(tmp_path / "qwen3_moe", "qwen3_moe"), facts, (grouped,) * 3)


def test_a_cell_of_latent_attention_holds_one_vector_for_all_heads(tmp_path: Path) -> None:
    facts = {"attention.kv_lora_rank": 32, "rope.dimension_count": 16}
    compare(save_runnable(tmp_path / "deepseek_v2", "deepseek_v2"), facts, (latent,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_llama_cpp_reports_is_what_the_formula_says(family: str, tmp_path: Path) -> None:
    if not CONVERTER.is_dir():
        pytest.skip(MISSING)
    from gguf_models import needs_of, save

    folder = save(family, tmp_path / family)
    assert not convert([folder], *needs_of(family).flags)
    source = folder.with_name(f"{family}.gguf")
    compare(source, facts_of(source), FAMILIES[family])
