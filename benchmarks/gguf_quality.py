"""GGUF files of the same size: llama.cpp's stock mixes and ours, by how far the model's output moves.

python benchmarks/gguf_quality.py [MODEL ...] [--text FILE ...]

Types are those that `llama-quantize` picks for each recipe (stock_mixes.py). "Stock" quantizes as it does without an
importance matrix; with one of ones some types leave less error, so that is shown apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import markdown_table, parser, save
from stock_mixes import stock_types

from alphaq import pipeline
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.gguf.model import gguf_tensors
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.quantizers.base import QUANTIZERS
from alphaq.quantizers.ggml import blocks_of, quantize_ggml
from alphaq.work.workers import Workers

TITLE = "GGUF at equal size"
RECIPES = ("Q2_K", "Q3_K_M", "Q4_K_M")
K_TYPES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0"
MAX_TOKENS = 4096
ABOUT = """\
Same bytes for every column of a row: the whole GGUF file, header and tokenizer included, as llama.cpp's stock recipe
makes it. KL in nats per token against the 16-bit model, the mean over the texts; perplexity is their geometric mean.
All files were evaluated with their weights restored in float32. *Stock* is what `llama-quantize` writes without an
importance matrix; *ones*: its types, quantized with an importance matrix of ones; *K types*: AlphaQ's plan from the
types that stock recipes use; *AlphaQ*: `alphaq quantize MODEL --engine llama.cpp --size BYTES`. No text is used by
any."""


def stock_plan(checkpoint: Checkpoint, recipe: str) -> Plan:
    """llama.cpp's own choice as a plan."""
    recipes = gguf_tensors(checkpoint)
    config = checkpoint.config
    heads = config["num_attention_heads"] // config["num_key_value_heads"]
    experts = checkpoint.architecture.experts_per_layer(config)
    types = stock_types(recipe, {tensor.name: tensor.shape for tensor in recipes}, experts, heads)
    return Plan(
        engine="llama.cpp",
        choices={matrix.name: types[t.name] for t in recipes if t.name in types for matrix in t.matrices},
    )


def as_stock(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
    """What llama.cpp makes of a matrix without an importance matrix."""
    rows, columns = weight.shape
    _, block, nbytes = GGML_BLOCKS[choice.name]
    codes = np.empty((rows, columns // block * nbytes), np.uint8)
    blocks_of(weight.float().contiguous().numpy(), choice.name, None, codes)
    return QuantizedMatrix(choice, (rows, columns), torch.from_numpy(codes), None, None, 0.0)


def fidelity(checkpoint: Checkpoint, plan: Plan, texts: list[Path], quantizer: Any, tokens: int) -> dict[str, Any]:
    """Write a plan's file and compare it with its source."""
    usual = QUANTIZERS["ggml"]
    QUANTIZERS["ggml"] = replace(usual, function=quantizer)
    try:
        with TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            with Workers(1, checkpoint) as workers:  # in this process, where the quantizer was exchanged
                written = pipeline.quantize(
                    checkpoint, plan, out, pipeline.WriteOptions(check=False), pipeline.Resources(workers)
                )
            found = pipeline.evaluate(out, Scoring(texts=tuple(texts), max_tokens=tokens), checkpoint.folder)
    finally:
        QUANTIZERS["ggml"] = usual
    assert found.mean_kl is not None  # there is a reference
    kept = {"size_bytes": written.size_bytes, "kl": found.mean_kl, "perplexity": found.geomean_perplexity}
    return kept | {"texts": {name: one.kl for name, one in found.texts.items()}}


def compare(model: Path, recipe: str, texts: list[Path], cache: Cache, tokens: int) -> dict[str, Any]:
    """One row: a recipe's bytes spent in four ways."""
    checkpoint = open_checkpoint(model)
    stock = stock_plan(checkpoint, recipe)
    row: dict[str, Any] = {"stock": fidelity(checkpoint, stock, texts, as_stock, tokens)}
    row["ones"] = fidelity(checkpoint, stock, texts, quantize_ggml, tokens)
    budget = Budget(size_bytes=row["stock"]["size_bytes"])
    for name, choices in (("k_types", K_TYPES), ("alphaq", None)):
        request = resolve(PlanConfig(budget=budget, engine="llama.cpp", choices=choices))
        plan = make_plan(checkpoint, request, measure_for_plan(checkpoint, request, resources=Resources(cache=cache)))
        row[name] = fidelity(checkpoint, plan, texts, quantize_ggml, tokens)
    return {"model": checkpoint.name, "recipe": recipe, **row}


def rendered(rows: list[Mapping[str, Any]]) -> str:
    """The table."""
    header = (
        "model, size of",
        "MiB",
        "KL stock",
        "ones",
        "K types",
        "AlphaQ",
        "AlphaQ ÷ stock",
        "perplexity stock",
        "AlphaQ",
    )
    lines = [
        (
            f"{row['model']}, {row['recipe']}",
            f"{row['stock']['size_bytes'] / 2**20:.2f}",
            *(f"{row[name]['kl']:.5f}" for name in ("stock", "ones", "k_types", "alphaq")),
            f"**{row['alphaq']['kl'] / row['stock']['kl']:.2f}**",
            *(f"{row[name]['perplexity']:.3f}" for name in ("stock", "alphaq")),
        )
        for row in rows
    ]
    return ABOUT + "\n\n" + markdown_table(header, lines)


def main() -> None:
    """Every model at every recipe's size."""
    data = Path(str(files("alphaq") / "data"))
    arguments = parser(__doc__)
    arguments.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="the bundled one by default")
    arguments.add_argument("--text", nargs="+", type=Path, help="the bundled ones by default")
    arguments.add_argument("--skip", type=int, default=0, help="characters to leave out at the start of each text")
    given = arguments.parse_args()
    recipes, tokens = (RECIPES[:1], 512) if given.quick else (RECIPES, MAX_TOKENS)
    rows = []
    with TemporaryDirectory() as folder:
        texts = []
        for path in given.text or sorted((data / "texts").glob("*.txt")):
            texts.append(Path(folder) / path.name)
            texts[-1].write_text(path.read_text(encoding="utf-8")[given.skip :], encoding="utf-8")
        for model in given.models or [data / "tiny"]:
            checkpoint = open_checkpoint(model)
            with Cache(Path(folder), {"fingerprint": checkpoint.fingerprint}) as cache:
                rows += [compare(model, recipe, texts, cache, tokens) for recipe in recipes]
    save("gguf_quality", TITLE, rows, rendered(rows), given.quick)


if __name__ == "__main__":
    main()
