"""Tokens per second as `alphaq plan` foretells them, bandwidth ÷ bytes that a token reads, against decoding for real.

    python benchmarks/decode_speed.py MODEL [MODEL ...] [--bits 2.5 4 8] [--threads 2] [--steps 64] [--scratch DIR]

Each model is quantized for llama.cpp and for the native runtime (`--method distortion --noise analytic --fast`) at each
width. The bandwidth is measured before and after each contestant, by as many threads as it has, and the mean of both
counts. Small models that lie in a cache are faster than any memory: take models much larger than it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import SCRATCH, markdown_table, parser, save

from alphaq.measuring.bandwidth import measured_bandwidth
from runtime import PROMPT, Contestant, alphaq, random_tokens

TITLE = "Decode speed as foretold"
ENGINES = {"llama.cpp": "llama.cpp", "native": "native"}
BITS = ("2.5", "4", "8")


def main() -> None:
    """Measure, print, and keep the result."""
    options = parser(__doc__)
    options.add_argument("models", nargs="+", type=Path)
    options.add_argument("--bits", nargs="+", default=BITS)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--steps", type=int, default=64)
    options.add_argument("--scratch", type=Path, default=SCRATCH)
    arguments = options.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for model in arguments.models
        for engine in ENGINES
        for bits in arguments.bits
        for row in compared(model, engine, bits, arguments)
    ]
    save(
        "decode_speed",
        TITLE,
        rows,
        markdown_table(list(rows[0]), [list(row.values()) for row in rows]),
        arguments.quick,
    )


def compared(model: Path, engine: str, bits: str, arguments: Any) -> Iterator[dict[str, Any]]:
    """One model at one size in one engine."""
    out = arguments.scratch / f"decode-{model.name}-{engine}-{bits}"
    if not out.exists():
        usual = ("--method", "distortion", "--noise", "analytic", *(["--fast"] if engine == "llama.cpp" else []))
        alphaq("quantize", model, "--engine", engine, "--bits", bits, *usual, "-o", out)
    from alphaq.nouns.plan import Plan

    read_bytes = Plan.read(out / "plan.json").read_bytes
    assert read_bytes is not None  # every plan of a model says so
    runner = Contestant(f"{engine} {bits}", engine, bits, out, 0.0, 0)
    before = measured_bandwidth(arguments.threads).bytes_per_second
    runner.start(out, arguments.threads)
    try:
        prompts, forced = random_tokens(1, PROMPT), random_tokens(1, arguments.steps)
        runner.ask("decode", prompts=prompts, steps=arguments.steps, forced=forced)
        taken = min(runner.ask("decode", prompts=prompts, steps=arguments.steps, forced=forced) for _ in range(3))
    finally:
        runner.stop()
    bandwidth = (before + measured_bandwidth(arguments.threads).bytes_per_second) / 2
    foretold, measured = bandwidth / read_bytes, arguments.steps / taken
    sys.stderr.write(f"{out.name}: {foretold:.1f} foretold, {measured:.1f} measured\n")
    yield {
        "model": model.name,
        "engine": engine,
        "bits": bits,
        "a token reads, MB": round(read_bytes / 1e6, 1),
        "bandwidth, GB/s": round(bandwidth / 1e9, 2),
        "foretold, tokens/s": round(foretold, 1),
        "measured, tokens/s": round(measured, 1),
        "measured / foretold": round(measured / foretold, 2),
    }


if __name__ == "__main__":
    main()
