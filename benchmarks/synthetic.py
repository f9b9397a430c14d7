"""A checkpoint with the names, shapes and dtypes of Qwen1.5-MoE-A2.7B or Qwen3-30B-A3B and random weights.

    python benchmarks/synthetic.py OUT [--layers 6] [--shape qwen3]

That of Qwen3 has the tokenizer and the vocabulary of the bundled model, so that GGUF files can be made of it.

Each matrix is w = (z + u·v) ∘ (r ⊗ c): a window of one pool of Gaussian numbers, plus a low-rank part,
times Pareto factors of its rows and columns whose exponents depend on its name, so that every matrix has
a tail of its own. Weights are written in pieces of a megabyte or two, so memory stays small.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from common import parser

ITEM_BYTES = 2
SHARD_BYTES = 4_000_000_000
POOL_SIZE = 1 << 24
PIECE_SIZE = 1 << 19
RANK = 4
SPREAD = 0.02


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a Qwen2-MoE model; the defaults are those of Qwen1.5-MoE-A2.7B."""

    layers: int = 24
    experts: int = 60
    hidden: int = 2048
    expert_width: int = 1408
    shared_width: int = 5632
    heads: int = 16
    vocabulary: int = 151936

    def config(self) -> dict[str, Any]:
        """config.json as published, with these sizes."""
        return {
            "architectures": ["Qwen2MoeForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": min(151643, self.vocabulary - 1),
            "decoder_sparse_step": 1,
            "eos_token_id": min(151643, self.vocabulary - 1),
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": SPREAD,
            "intermediate_size": self.shared_width,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "model_type": "qwen2_moe",
            "moe_intermediate_size": self.expert_width,
            "norm_topk_prob": False,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": 4,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "output_router_logits": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": self.shared_width,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, from the first layer to the last."""
        hidden = self.hidden
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for part in ("q_proj", "k_proj", "v_proj"):
                yield f"{prefix}self_attn.{part}.weight", (hidden, hidden)
                yield f"{prefix}self_attn.{part}.bias", (hidden,)
            yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
            yield f"{prefix}mlp.gate.weight", (self.experts, hidden)
            for expert in range(self.experts):
                yield from _gated(f"{prefix}mlp.experts.{expert}.", self.expert_width, hidden)
            yield from _gated(f"{prefix}mlp.shared_expert.", self.shared_width, hidden)
            yield f"{prefix}mlp.shared_expert_gate.weight", (1, hidden)
            yield f"{prefix}input_layernorm.weight", (hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    @property
    def parameters(self) -> int:
        """Weights in all."""
        return sum(math.prod(shape) for _, shape in self.tensors())


@dataclass(frozen=True)
class Qwen3Dimensions(Dimensions):
    """Sizes of a Qwen3-MoE model; the defaults are those of Qwen3-30B-A3B but for the vocabulary."""

    layers: int = 48
    experts: int = 128
    expert_width: int = 768
    shared_width: int = 6144
    heads: int = 32
    vocabulary: int = 4096
    shared_heads: int = 4
    head_size: int = 128

    def config(self) -> dict[str, Any]:
        """config.json as published, with these sizes."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "decoder_sparse_step": 1,
            "eos_token_id": 0,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": SPREAD,
            "intermediate_size": self.shared_width,
            "max_position_embeddings": 40960,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.expert_width,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": 8,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.shared_heads,
            "output_router_logits": False,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, from the first layer to the last."""
        hidden, wide = self.hidden, self.heads * self.head_size
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield f"{prefix}self_attn.q_proj.weight", (wide, hidden)
            for part in ("k_proj", "v_proj"):
                yield f"{prefix}self_attn.{part}.weight", (self.shared_heads * self.head_size, hidden)
            yield f"{prefix}self_attn.o_proj.weight", (hidden, wide)
            for part in ("q_norm", "k_norm"):
                yield f"{prefix}self_attn.{part}.weight", (self.head_size,)
            yield f"{prefix}mlp.gate.weight", (self.experts, hidden)
            for expert in range(self.experts):
                yield from _gated(f"{prefix}mlp.experts.{expert}.", self.expert_width, hidden)
            yield f"{prefix}input_layernorm.weight", (hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)


QUICK = Dimensions(2, experts=4, hidden=256, expert_width=128, shared_width=256, heads=4, vocabulary=1000)
SHAPES = {
    "qwen1.5": (Dimensions(), QUICK),
    "qwen3": (
        Qwen3Dimensions(),
        Qwen3Dimensions(2, experts=8, hidden=256, expert_width=256, heads=4, shared_heads=2, head_size=64),
    ),
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def _gated(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}gate_proj.weight", (width, hidden)
    yield f"{prefix}up_proj.weight", (width, hidden)
    yield f"{prefix}down_proj.weight", (hidden, width)


def random_matrix(name: str, rows: int, columns: int, pool: torch.Tensor) -> Iterator[torch.Tensor]:
    """A matrix seeded by its name, bfloat16, a few rows at a time."""
    random = _generator(name)
    down, across = (_factors(random, side) for side in (rows, columns))
    left = torch.from_numpy(random.standard_normal((rows, RANK), dtype=np.float32))
    right = torch.from_numpy(random.standard_normal((RANK, columns), dtype=np.float32))
    right *= random.uniform(0, 0.5)
    down *= SPREAD
    step = max(1, PIECE_SIZE // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        begin = int(random.integers(len(pool) - count * columns))
        window = pool[begin : begin + count * columns].view(count, columns)
        piece = torch.addmm(window, left[first : first + count], right)
        yield piece.mul_(across).mul_(down[first : first + count, None]).bfloat16()


def random_vector(name: str, size: int) -> torch.Tensor:
    """A norm near 1, or a small bias."""
    values = torch.from_numpy(_generator(name).standard_normal(size, dtype=np.float32))
    return (values * SPREAD + ("norm" in name)).bfloat16()


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _factors(random: np.random.Generator, count: int) -> torch.Tensor:
    """Pareto numbers of mean square 1; a small exponent gives a heavy tail."""
    values = 1 + random.pareto(random.uniform(2.5, 10), count)
    return torch.from_numpy((values / np.sqrt(np.mean(values**2))).astype(np.float32))


def shards(dimensions: Dimensions, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, as many to a file as fit."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in dimensions.tensors():
        size = ITEM_BYTES * math.prod(shape)
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    return groups


def write_shard(file: BinaryIO, tensors: dict[str, tuple[int, ...]], pool: torch.Tensor) -> None:
    """One safetensors file: length of the header, header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + ITEM_BYTES * math.prod(tensors[name])
        header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in sorted(tensors):
        shape = tensors[name]
        pieces = random_matrix(name, *shape, pool) if len(shape) == 2 else [random_vector(name, *shape)]
        for piece in pieces:
            file.write(piece.view(torch.uint8).numpy())


def write_checkpoint(folder: Path, dimensions: Dimensions, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the checkpoint; the folder appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pool = torch.from_numpy(np.random.default_rng(0).standard_normal(POOL_SIZE, dtype=np.float32))
    written = shards(dimensions, shard_bytes)
    where = {}
    for number, tensors in enumerate(written, start=1):
        shard = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        with (partial / shard).open("wb") as file:
            write_shard(file, tensors, pool)
        where.update(dict.fromkeys(tensors, shard))
    index = {
        "metadata": {"total_size": ITEM_BYTES * dimensions.parameters},
        "weight_map": dict(sorted(where.items())),
    }
    for name, content in (("config.json", dimensions.config()), ("model.safetensors.index.json", index)):
        (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if isinstance(dimensions, Qwen3Dimensions):
        for name in TOKENIZER:
            (partial / name).write_bytes((files("alphaq") / "data" / "tiny" / name).read_bytes())
    partial.rename(folder)


def main() -> None:
    """Write one checkpoint."""
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path, metavar="OUT", help="folder to write")
    arguments.add_argument("--layers", type=int, help="how many layers; all by default")
    arguments.add_argument("--shape", choices=SHAPES, default="qwen1.5", help="of which model")
    given = arguments.parse_args()
    if given.folder.exists():
        sys.exit(f"{given.folder} already exists. Remove it or choose another folder.")
    whole, quick = SHAPES[given.shape]
    dimensions = quick if given.quick else whole
    write_checkpoint(given.folder, replace(dimensions, layers=given.layers or dimensions.layers))


if __name__ == "__main__":
    main()
