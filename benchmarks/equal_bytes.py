"""Ways to quantize a model, at equal stored bytes: the KL of their files.

    python benchmarks/equal_bytes.py MODEL [MODEL ...] --text TEXT [TEXT ...] --way NAME=OPTIONS [--way ...]
        [--bits 2 2.5 3] [--max-tokens 512] [--scratch DIR]

OPTIONS are those of `alphaq quantize`, which gets as `--size` so many bits for every parameter of the model: experts,
attention, embedding and all else share them. Trellis codes beside the usual choices:

    --way "usual=" --way "trellis=--choices trellis,5,6,8"

A way whose options say `--bits {bits}` gets that budget instead, for experts alone.

Each cell is kept in the scratch folder as soon as it is measured: the same call goes on where a killed one was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from common import SCRATCH, markdown_table, parser, results_folder, save

from runtime import alphaq

TITLE = "Ways to quantize, at equal bytes"


@dataclass(frozen=True)
class Way:
    """Options of `alphaq quantize`, and what the table calls them."""

    name: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Judge:
    """Texts that KL is measured on, and where cells are kept."""

    texts: tuple[Path, ...]
    max_tokens: int
    scratch: Path


def cell(model: Path, size: int, way: Way, judge: Judge) -> dict[str, Any]:
    """Stored bytes and KL of one file, as measured now or by an earlier call."""
    told = [str(model.resolve()), size, way.options, list(map(str, judge.texts)), judge.max_tokens]
    kept = judge.scratch / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"
    if not kept.is_file():
        out = judge.scratch / f"{kept.stem}.out"
        shutil.rmtree(out, ignore_errors=True)
        budget = () if "--bits" in way.options else ("--size", str(size))
        made = alphaq("quantize", model, "-o", out, *budget, *way.options, "--quiet")
        texts = [word for text in judge.texts for word in ("--text", text)]
        found = alphaq("eval", out, "--reference", model, *texts, "--max-tokens", str(judge.max_tokens), "--quiet")
        shutil.rmtree(out)
        kept.write_text(json.dumps({"size_bytes": made["size_bytes"], "kl": found["mean_kl"]}), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def cells(model: Path, ways: list[Way], bits: str, judge: Judge) -> Iterator[dict[str, Any]]:
    """All ways at one budget."""
    size = int(float(bits) * alphaq("inspect", model)["parameters"] / 8)
    first: dict[str, Any] = {}
    for given in ways:
        way = Way(given.name, tuple(word.format(bits=bits) for word in given.options))
        found = cell(model, size, way, judge)
        first = first or found
        ratio = round(found["kl"] / first["kl"], 3)
        row = {"model": model.name, "bits": bits, "way": way.name, **found, "ratio": ratio}
        sys.stderr.write(f"{row}\n")
        yield {
            **row,
            "options": " ".join(way.options),
            "tokens": len(judge.texts) * judge.max_tokens,
            "date": date.today().isoformat(),
        }


def render(rows: list[dict[str, Any]]) -> str:
    """KL and, in brackets, what part it is of the first way's; a line for each model and size."""
    names = list(dict.fromkeys(row["way"] for row in rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["model"], row["bits"]), {})
        line[row["way"]] = f"{row['kl']:.4f} ({row['ratio']:.2f})"
    header = ["model, bits", *(f"`{name}`" for name in names)]
    return markdown_table(
        header,
        [[f"{model}, {bits}", *(line.get(name, "–") for name in names)] for (model, bits), line in lines.items()],
    )


def joined(new: list[dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """Rows kept before and new ones, which replace those of the same model, budget, way and tokens."""
    file = results_folder(quick) / "equal_bytes.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    keys = ("model", "bits", "options", "tokens")
    replaced = {tuple(row[key] for key in keys) for row in new}
    return [row for row in kept if tuple(row[key] for key in keys) not in replaced] + new


def main() -> None:
    """Measure, print, and keep the result."""
    options = parser(__doc__)
    options.add_argument("models", nargs="+", type=Path)
    options.add_argument("--text", nargs="+", type=Path, required=True)
    options.add_argument("--way", action="append", required=True, metavar="NAME=OPTIONS")
    options.add_argument("--bits", nargs="+", default=["2", "2.5", "3"])
    options.add_argument("--max-tokens", type=int, default=512, help="of each text")
    options.add_argument("--scratch", type=Path, default=SCRATCH)
    given = options.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    judge = Judge(tuple(given.text), given.max_tokens, given.scratch)
    ways = [Way(name, tuple(words.split())) for name, _, words in (way.partition("=") for way in given.way)]
    rows: list[dict[str, Any]] = []
    for model in given.models:
        for bits in given.bits:
            rows += cells(model, ways, bits, judge)
            whole = joined(rows, given.quick)
            save("equal_bytes", TITLE, whole, render(whole), given.quick)


if __name__ == "__main__":
    main()
