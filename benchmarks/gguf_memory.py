"""A 16-bit GGUF file that is larger than the memory that a process may use: analysed, planned, quantized, observed.

    python benchmarks/gguf_memory.py [--layers 1 3] [--limit 700MiB] [--scratch DIR]

Each process may have so much memory of its own (`ulimit -d`: what it has asked for, whether touched or not); pages of
the file itself are the system's to keep or drop. Peak private memory is what was touched, over all processes together.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import SCRATCH, markdown_table, parser, save
from end_to_end import alphaq, evict, watched

from alphaq.checkpoint.gguf.format import layout
from alphaq.checkpoint.gguf.values import GgufValue, Scalar
from alphaq.nouns.settings import parse_size

TITLE = "GGUF files larger than memory"
LAYERS, QUICK_LAYERS = (1, 3), (1,)
LIMIT = "700MiB"
ARCH = "granitemoe"  # of no family that AlphaQ has a table of, so that llama.cpp runs the passes
HIDDEN, WIDTH, EXPERTS, USED, HEADS, VOCABULARY = 2048, 768, 64, 8, 16, 32_000
TYPES = "Q2_K,Q3_K,Q4_K,Q6_K"
ABOUT = f"""\
16-bit files of {ARCH!r} with random weights ({EXPERTS} experts of {WIDTH}, hidden size {HIDDEN}, {VOCABULARY:,} words).
`analyze`, `plan --engine llama.cpp --size` by the default method (which runs the file in llama.cpp) with
`--choices {TYPES}`, `quantize --plan`, which reads the result again, and `imatrix`; one worker each. Every process was
limited to so much private memory (`ulimit -d`). Private memory is the peak of all processes together, libraries
included."""


def write_model(path: Path, layers: int) -> Path:
    """A file of random weights, streamed."""
    metadata = {key: GgufValue.of(kind, value) for key, (kind, value) in _metadata(layers).items()}
    tensors = dict(_tensors(layers))
    header, places, _ = layout(metadata, tensors)
    drawn = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02
    pool = (drawn.view(np.uint32) >> 16).astype(np.uint16)
    with path.open("wb") as file:
        file.write(header)
        for number, (name, (type, shape)) in enumerate(tensors.items()):
            file.seek(places[name].begin)
            if type == "F32":
                one = np.ones(shape, np.float32) if "norm" in name else drawn[: int(np.prod(shape))].reshape(shape)
                file.write(one.tobytes())
                continue
            left, begin = int(np.prod(shape)), 7919 * number % (1 << 23)
            while left:
                piece = pool[begin : begin + left]
                file.write(piece.tobytes())
                left, begin = left - len(piece), begin * 31 % (1 << 23)
        file.truncate(max(file.tell(), -(-file.tell() // 32) * 32))
    return path


def _metadata(layers: int) -> dict[str, tuple[str, Scalar]]:
    counts = {
        "block_count": layers,
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS // 4,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
        "vocab_size": VOCABULARY,
    }
    scales = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale", "rope.freq_base")
    values = dict(zip(scales, (0.1, 12.0, 0.22, 6.0, 10_000.0), strict=True))
    return {
        "general.architecture": ("string", ARCH),
        **{f"{ARCH}.{key}": ("uint32", value) for key, value in counts.items()},
        f"{ARCH}.attention.layer_norm_rms_epsilon": ("float32", 1e-6),
        **{f"{ARCH}.{key}": ("float32", value) for key, value in values.items()},
        "tokenizer.ggml.model": ("string", "none"),
    }


def _tensors(layers: int) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    yield "token_embd.weight", ("BF16", (VOCABULARY, HIDDEN))
    for layer in range(layers):
        head = f"blk.{layer}."
        yield f"{head}attn_norm.weight", ("F32", (HIDDEN,))
        for name, rows in (("q", HIDDEN), ("k", HIDDEN // 4), ("v", HIDDEN // 4), ("output", HIDDEN)):
            yield f"{head}attn_{name}.weight", ("BF16", (rows, HIDDEN))
        yield f"{head}ffn_norm.weight", ("F32", (HIDDEN,))
        yield f"{head}ffn_gate_inp.weight", ("F32", (EXPERTS, HIDDEN))
        for name, rows, columns in (("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
            yield f"{head}ffn_{name}_exps.weight", ("BF16", (EXPERTS, rows, columns))
    yield "output_norm.weight", ("F32", (HIDDEN,))


def limited(command: Sequence[str], limit: int) -> list[str]:
    """A command whose processes may each ask for so many bytes."""
    return ["sh", "-c", f'ulimit -d {limit >> 10}; exec "$@"', "sh", *command]


def commands(source: Path, scratch: Path) -> dict[str, list[str]]:
    """What is run, by its name, in this order."""
    plan, size = scratch / "plan.json", source.stat().st_size // 4
    asked = ("--engine", "llama.cpp", "--size", size, "--choices", TYPES, "--workers", 1)
    return {
        "analyze": alphaq("analyze", source, "--workers", 1, "-o", scratch / "stats.csv"),
        "plan": alphaq("plan", source, *asked, "-o", plan),
        "quantize": alphaq("quantize", source, "--plan", plan, "--workers", 1, "-o", scratch / "gguf-out"),
        "imatrix": alphaq("imatrix", source, "--tokens", 2048, "-o", scratch / "imatrix.gguf"),
    }


def run(layers: int, limit: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """One file, made if missing; what comes of it is deleted."""
    source = scratch / f"{ARCH}-{layers}-layers" / "model.gguf"
    if not source.exists():
        source.parent.mkdir(exist_ok=True)
        write_model(source, layers)
    for left in ("gguf-out", "cache"):
        shutil.rmtree(scratch / left, ignore_errors=True)
    for name, command in commands(source, scratch).items():
        evict(source.parent)
        environment = {**os.environ, "ALPHAQ_CACHE": str(scratch / "cache")}
        usage = watched(limited(command, limit), environment, scratch / "printed")
        yield {"command": name, "layers": layers, "source_bytes": source.stat().st_size, "usage": asdict(usage)}
    shutil.rmtree(scratch / "gguf-out")


def render(rows: Sequence[dict[str, Any]], limit: int) -> str:
    """Rows as Markdown."""
    header = ["command", "layers", "file GB", "limit MiB", "private MiB", "CPU seconds", "seconds"]
    table = [
        [
            row["command"],
            row["layers"],
            f"{row['source_bytes'] / 1e9:.2f}",
            f"{limit >> 20:,}",
            f"{row['usage']['peak_private_bytes'] / 2**20:,.0f}",
            f"{row['usage']['cpu_s']:,.0f}",
            f"{row['usage']['wall_s']:,.0f}",
        ]
        for row in rows
    ]
    return f"{ABOUT}\n\n{markdown_table(header, table)}"


def main() -> None:
    """Run, show and keep."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", help="sizes to run; 1 and 3 by default")
    arguments.add_argument("--limit", type=parse_size, default=parse_size(LIMIT), help="of each process; 700MiB")
    arguments.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for files, about 4 GB")
    given = arguments.parse_args()
    if sys.platform != "linux":
        sys.exit("This benchmark reads Linux's /proc. Run it on Linux.")
    scratch: Path = given.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for layers in given.layers or (QUICK_LAYERS if given.quick else LAYERS):
        for row in run(layers, given.limit, scratch):
            rows.append(row)
            save("gguf_memory", TITLE, rows, render(rows, given.limit), given.quick)


if __name__ == "__main__":
    main()
