"""One layer of random weights in the shapes of large models, and checkpoints whose codes are random, too.

    python benchmarks/runtime_random.py {mixtral,qwen} OUT [--quick]
    python benchmarks/runtime_random.py SOURCE OUT --plan PLAN

Searching the codes of llama.cpp's types, or of a trellis, takes minutes for one layer of Mixtral's; multiplying with
them takes as long as with any others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser
from synthetic import Dimensions, write_checkpoint

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.formats.table import format_of
from alphaq.formats.trellis import Trellis
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import DEFAULT, QUANTIZERS
from alphaq.work.workers import Workers

VOCABULARY = 4096
SHARD_BYTES = 1_000_000_000
DRAWN = {  # types of llama.cpp: where float16 are in a block, and which give weights near 0.02
    "IQ2_XXS": {0: 5e-4},
    "IQ2_XS": {0: 5e-4},
    "Q2_K": {80: 1e-3, 82: 1.5e-3},
    "Q3_K": {108: 6e-4},
    "Q4_K": {0: 1e-4, 2: 7e-4},
    "Q4_0": {0: 4e-3},
    "Q5_0": {0: 2e-3},
}
ROW_SCALE = 0.06  # of a row of trellis codes, likewise


@dataclass(frozen=True)
class MixtralDimensions(Dimensions):
    """Sizes of a Mixtral model; the defaults are those of one layer of Mixtral-8x7B."""

    layers: int = 1
    experts: int = 8
    hidden: int = 4096
    expert_width: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = VOCABULARY

    def config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        from transformers import MixtralConfig

        made = MixtralConfig(
            architectures=["MixtralForCausalLM"],
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.expert_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            num_local_experts=self.experts,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=0,
            dtype="bfloat16",
        )
        return made.to_dict()

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, from the first layer to the last."""
        hidden, width = self.hidden, self.expert_width
        narrow = hidden // self.heads * self.key_value_heads
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for number in range(self.layers):
            prefix = f"model.layers.{number}."
            for part, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
                yield f"{prefix}self_attn.{part}_proj.weight", (rows, hidden)
            yield f"{prefix}block_sparse_moe.gate.weight", (self.experts, hidden)
            for expert in range(self.experts):
                for part, shape in (("w1", (width, hidden)), ("w2", (hidden, width)), ("w3", (width, hidden))):
                    yield f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight", shape
            yield f"{prefix}input_layernorm.weight", (hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)


SHAPES: dict[str, tuple[Dimensions, Dimensions]] = {  # real, quick
    "mixtral": (MixtralDimensions(), MixtralDimensions(hidden=512, expert_width=1024, heads=8, key_value_heads=2)),
    "qwen": (
        Dimensions(layers=1, vocabulary=VOCABULARY),
        Dimensions(1, experts=16, hidden=256, expert_width=256, shared_width=512, heads=4, vocabulary=VOCABULARY),
    ),
}


def drawing(own: Callable[..., QuantizedMatrix]) -> Callable[..., QuantizedMatrix]:
    """A quantizer but for choices whose codes may be anything: those get scales and then random bytes."""

    def draw(weight: torch.Tensor, choice: Choice, name: str = "matrix", **more: Any) -> QuantizedMatrix:
        (rows, columns), generator = weight.shape, np.random.default_rng(len(name))
        if isinstance(form := format_of(choice), Trellis):
            codes = generator.integers(256, size=(rows, form.row_bytes(choice, columns)), dtype=np.uint8)
            scales = torch.full((rows, choice.groups(columns)), ROW_SCALE, dtype=torch.float16)
            return QuantizedMatrix(choice, (rows, columns), torch.from_numpy(codes), scales, None, 0.0)
        if choice.name not in DRAWN:
            return own(weight, choice, name, **more)
        _, block, nbytes = GGML_BLOCKS[choice.name]
        codes = generator.integers(256, size=(rows, columns // block, nbytes), dtype=np.uint8)
        for place, scale in DRAWN[choice.name].items():
            codes[:, :, place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return QuantizedMatrix(choice, (rows, columns), torch.from_numpy(codes.reshape(rows, -1)), None, None, 0.0)

    return draw


def write_drawn(source: Path, plan: Path, out: Path) -> None:
    """`alphaq quantize SOURCE --plan PLAN -o OUT`, but for codes of the types in `DRAWN` and of a trellis."""
    for name in ("ggml", DEFAULT):
        QUANTIZERS[name] = replace(QUANTIZERS[name], function=drawing(QUANTIZERS[name].function))
    checkpoint = open_checkpoint(source)
    with Workers(1, checkpoint) as workers:  # in this process, where the quantizer was exchanged
        pipeline.quantize(
            checkpoint, Plan.read(plan), out, pipeline.WriteOptions(check=False), pipeline.Resources(workers)
        )


def main() -> None:
    """Write one checkpoint."""
    arguments = parser(__doc__)
    arguments.add_argument("source", help=f"{', '.join(SHAPES)}, or the folder of a checkpoint")
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--plan", type=Path, help="of the checkpoint to write")
    given = arguments.parse_args()
    if given.plan:
        write_drawn(Path(given.source), given.plan, given.out)
    else:
        write_checkpoint(given.out, SHAPES[given.source][given.quick], SHARD_BYTES)


if __name__ == "__main__":
    main()
