"""Tokens per second as plans foretell them against decoding for real.

    python benchmarks/decode_speed.py MODEL ... [--engines llama.cpp native] [--bits 2.5 4 8] [--steps 16]
        [--scratch DIR] [--prepare]

Each model is quantized for both engines (`--method distortion --noise analytic`, and `--fast` for llama.cpp) at each
width. Then, one by one, its kernels are measured as `alphaq bench` does, and the engine decodes. Small models that lie
in a cache are faster than any memory: take models much larger than it. Another program that computes meanwhile spoils
the result, as threads then wait for one another: repeat what differs from one run to the next. `--prepare` quantizes
and measures nothing, so that what is timed can run alone. Results of other cells, from earlier runs,
are kept.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import SCRATCH, markdown_table, parser, results_folder, save

from alphaq.nouns.plan import Plan
from alphaq.nouns.rates import SECOND_NS
from alphaq.trials.rates import rates_here
from alphaq.work.cores import available_cores
from runtime import PROMPT, Contestant, alphaq, random_tokens

NAME, TITLE = "decode_speed", "Decode speed as foretold"
ENGINES = {"llama.cpp": ("--fast",), "native": ("--fast",)}
ROUNDS = 13
BITS = ("2.5", "4", "8")


def main() -> None:
    """Measure, print, and keep the result."""
    options = parser(__doc__)
    options.add_argument("models", nargs="+", type=Path)
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=tuple(ENGINES))
    options.add_argument("--bits", nargs="+", default=BITS)
    options.add_argument("--steps", type=int, default=16)
    options.add_argument("--scratch", type=Path, default=SCRATCH)
    options.add_argument("--prepare", action="store_true")
    arguments = options.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    folders = {
        (model, engine, bits): prepared(model, engine, bits, arguments.scratch)
        for model in arguments.models
        for engine in arguments.engines
        for bits in arguments.bits
    }
    if arguments.prepare:
        return
    rows = [
        compared(model.name, engine, bits, folder, arguments.steps) for (model, engine, bits), folder in folders.items()
    ]
    rows = [*earlier({(model.name, engine, bits) for model, engine, bits in folders}), *rows]
    save(NAME, TITLE, rows, markdown_table(list(rows[0]), [list(row.values()) for row in rows]), arguments.quick)


def earlier(made: set[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Rows of other models, engines and sizes."""
    path = results_folder(False) / f"{NAME}.json"
    known = json.loads(path.read_bytes())["rows"] if path.is_file() else []
    return [row for row in known if (row["model"], row["engine"], row["bits"]) not in made]


def prepared(model: Path, engine: str, bits: str, scratch: Path) -> Path:
    """A model quantized at one size for one engine."""
    out = scratch / f"decode-{model.name}-{engine}-{bits}"
    if not out.exists():
        usual = ("--method", "distortion", "--noise", "analytic", *ENGINES[engine])
        alphaq("quantize", model, "--engine", engine, "--bits", bits, *usual, "-o", out)
    return out


def compared(model: str, engine: str, bits: str, folder: Path, steps: int) -> dict[str, Any]:
    """One model at one size in one engine."""
    plan = Plan.read(folder / "plan.json")
    assert plan.reads is not None  # every plan of a model says so
    with TemporaryDirectory() as scratch:
        found = rates_here(Path(scratch), engine, set(plan.every_choice().values()))
    rates = found.rates
    if found.missing or found.doubtful:
        sys.exit(
            f"{folder.name}: {found.missing or 'other programs disturb the measurement of ' + str(found.doubtful)}"
        )
    measured = steps / decoded(Contestant(f"{engine} {bits}", engine, bits, folder, 0.0, 0), steps)
    foretold = SECOND_NS / rates.token_time_ns(plan.reads.by_choice, plan.reads.layers)
    sys.stderr.write(f"{folder.name}: {foretold:.1f} foretold, {measured:.1f} measured\n")
    return {
        "model": model,
        "engine": engine,
        "bits": bits,
        "a token reads, MB": round(plan.reads.total / 1e6, 1),
        "by memory alone, tokens/s": round(rates.memory / plan.reads.total, 1),
        "foretold, tokens/s": round(foretold, 1),
        "measured, tokens/s": round(measured, 1),
        "measured / foretold": round(measured / foretold, 2),
        "rates": str(rates.among(plan.reads.by_choice)),
    }


def decoded(runner: Contestant, steps: int) -> float:
    """Seconds of so many tokens, one at a time."""
    runner.start(runner.folder, available_cores())
    try:
        prompts, forced = random_tokens(1, PROMPT), random_tokens(1, steps)
        taken = [runner.ask("decode", prompts=prompts, steps=steps, forced=forced) for _ in range(ROUNDS)]
        return statistics.median(taken[1:])
    finally:
        runner.stop()


if __name__ == "__main__":
    main()
