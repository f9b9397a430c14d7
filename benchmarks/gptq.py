"""GPTQ on a synthetic checkpoint of a Mixtral's shape, on inputs that the model writes itself: time and peak memory.

    python benchmarks/gptq.py [--layers 4 34] [--tokens 12288] [--scratch DIR]

34 layers are 10.2 GB. Memory should not grow with layers; it does with tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import SCRATCH, markdown_table, parser, save
from end_to_end import alphaq, evict, watched
from runtime_random import MixtralDimensions
from synthetic import write_checkpoint

TITLE = "GPTQ in little memory"
LAYERS, QUICK_LAYERS = (4, 34), (1, 2)
TOKENS, QUICK_TOKENS = 12_288, 1024
DIMENSIONS = MixtralDimensions(hidden=2048, expert_width=2816, heads=16, key_value_heads=4)
QUICK = MixtralDimensions(hidden=256, expert_width=256, heads=4, key_value_heads=2)
ABOUT = """\
`alphaq quantize MODEL --bits 3 --method uniform --noise analytic --quantizer gptq --calibration self` on bf16
checkpoints of a Mixtral's shape (8 experts of 2,816, two to a token, hidden size 2,048) with random weights. Two passes
of all tokens through the model (one to write them, one to round), the rounding, and the re-reading of the result.
Resident memory is that of the process, libraries included, at its peak. `left` counts matrices that too few tokens
reached."""


def run(dimensions: MixtralDimensions, tokens: int, scratch: Path) -> dict[str, Any]:
    """One checkpoint, made if missing; its quantized form is deleted."""
    source = scratch / f"mixtral-{dimensions.hidden}-{dimensions.layers}-layers"
    if not source.exists():
        write_checkpoint(source, dimensions)
    out, printed = scratch / "gptq-out", scratch / "gptq.json"
    shutil.rmtree(out, ignore_errors=True)
    evict(source)
    options = ("--bits", 3, "--fast", "--method", "uniform", "--noise", "analytic", "--quantizer", "gptq", "--json")
    command = alphaq("quantize", source, "-o", out, *options, "--calibration", "self", "--calibration-tokens", tokens)
    usage = watched(command, {**os.environ, "ALPHAQ_CACHE": str(scratch / "cache")}, printed)
    done = json.loads(printed.read_bytes())
    shutil.rmtree(out)
    printed.unlink()
    return {
        "layers": dimensions.layers,
        "tokens": tokens,
        "source_bytes": done["source_bytes"],
        "size_bytes": done["size_bytes"],
        "left": len(done["not_calibrated"]),
        "usage": asdict(usage),
    }


def render(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    header = ["layers", "tokens", "source GB", "quantized GB", "left", "seconds", "CPU seconds", "resident GiB"]
    table = [
        [
            row["layers"],
            f"{row['tokens']:,}",
            f"{row['source_bytes'] / 1e9:.2f}",
            f"{row['size_bytes'] / 1e9:.2f}",
            row["left"],
            f"{row['usage']['wall_s']:,.0f}",
            f"{row['usage']['cpu_s']:,.0f}",
            f"{row['usage']['largest_process_bytes'] / 2**30:.2f}",
        ]
        for row in rows
    ]
    return f"{ABOUT}\n\n{markdown_table(header, table)}"


def main() -> None:
    """Run, show and keep."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", help="sizes to run; 4 and 34 by default")
    arguments.add_argument("--tokens", type=int, help="of calibration; 12,288 by default")
    arguments.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for checkpoints, about 16 GB")
    given = arguments.parse_args()
    if sys.platform != "linux":
        sys.exit("This benchmark reads Linux's /proc. Run it on Linux.")
    scratch: Path = given.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    tokens = given.tokens or (QUICK_TOKENS if given.quick else TOKENS)
    rows = []
    for layers in given.layers or (QUICK_LAYERS if given.quick else LAYERS):
        rows.append(run(replace(QUICK if given.quick else DIMENSIONS, layers=layers), tokens, scratch))
        save("gptq", TITLE, rows, render(rows), given.quick)


if __name__ == "__main__":
    main()
