"""Ways to quantize a model, at equal stored bytes: the KL of their files.

    python benchmarks/equal_bytes.py MODEL [MODEL ...] --text TEXT [TEXT ...] --way NAME=OPTIONS [--way ...]
        [--bits 2 2.5 3] [--max-tokens 512] [--scratch DIR]

OPTIONS are those of `alphaq quantize`, which gets as `--size` so many bits for every parameter of the model: experts,
attention, embedding and all else share them. Trellis codes beside plain groups:

    --way "plain=--fast" --way "trellis=--choices trellis,5,6,8"

A way whose options say `--bits {bits}` or `--bpw {bits}` gets that budget instead, for experts alone. Files that
differ by more than one part in a hundred are refused.

Each cell is kept in the scratch folder as soon as it is measured: the same call goes on where a killed one was, unless
AlphaQ's version, the model or a text is another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import SCRATCH, markdown_table, parser, results_folder, save

from alphaq.checkpoint.reader import open_checkpoint
from runtime import alphaq

TITLE = "Ways to quantize, at equal bytes"
LIKE = 0.01  # part by which sizes of one line may differ


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


def digest(*told: object) -> str:
    """Short name of what something depends on."""
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:16]


def cell(model: Path, size: int, way: Way, judge: Judge) -> dict[str, Any]:
    """Stored bytes and KL of one file, as measured now or by an earlier call."""
    contents = (
        version("alphaq"),
        open_checkpoint(model).fingerprint,
        [text.read_bytes().hex() for text in judge.texts],
    )
    name = digest(*contents, size, way.options, judge.max_tokens)
    kept = judge.scratch / f"{name}.json"
    if not kept.is_file():
        out = judge.scratch / f"{name}.out"
        shutil.rmtree(out, ignore_errors=True)
        budget = () if {"--bits", "--bpw"} & {*way.options} else ("--size", str(size))
        made = alphaq("quantize", model, "-o", out, *budget, *way.options, "--quiet")
        texts = [word for text in judge.texts for word in ("--text", text)]
        found = alphaq("eval", out, "--reference", model, *texts, "--max-tokens", str(judge.max_tokens), "--quiet")
        shutil.rmtree(out)
        row = {"size_bytes": made["size_bytes"], "kl": found["mean_kl"], "date": date.today().isoformat()}
        kept.write_text(json.dumps(row), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def cells(model: Path, ways: list[Way], bits: str, judge: Judge) -> Iterator[dict[str, Any]]:
    """All ways at one budget, each beside the first."""
    size = int(float(bits) * alphaq("inspect", model)["parameters"] / 8)
    first: dict[str, Any] = {}
    for given in ways:
        way = Way(given.name, tuple(word.replace("{bits}", bits) for word in given.options))
        found = cell(model, size, way, judge)
        first = first or found
        if abs(found["size_bytes"] / first["size_bytes"] - 1) > LIKE:
            raise SystemExit(f"{way.name} has {found['size_bytes']:,} bytes, {ways[0].name} {first['size_bytes']:,}.")
        row = {"model": model.name, "bits": bits, "way": way.name, "beside": ways[0].name, **found}
        row["ratio"] = round(found["kl"] / first["kl"], 3)
        sys.stderr.write(f"{row}\n")
        yield {
            **row,
            "options": " ".join(word.rpartition("/")[2] for word in way.options),
            "texts": digest([text.read_bytes().hex() for text in judge.texts]),
            "tokens": len(judge.texts) * judge.max_tokens,
        }


def render(rows: list[dict[str, Any]]) -> str:
    """KL of each way and, in brackets, what part it is of that of the way beside it; a line for each model and size."""
    heads: dict[str, str] = {}
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        alone = row["way"] == row["beside"]
        heads[row["way"]] = f"`{row['way']}`" if alone else f"`{row['way']}` (part of `{row['beside']}`)"
        line = lines.setdefault((row["model"], row["bits"]), {})
        line[row["way"]] = f"{row['kl']:.4f}" + ("" if alone else f" ({row['ratio']:.2f})")
    table = [[f"{model}, {bits}", *(line.get(way, "–") for way in heads)] for (model, bits), line in lines.items()]
    return markdown_table(["model, bits", *heads.values()], table)


def joined(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows kept before and new ones, which replace those of the same model, budget, way, tokens and texts."""

    def key(row: dict[str, Any]) -> tuple[object, ...]:
        return tuple(row[name] for name in ("model", "bits", "way", "tokens", "texts"))

    replaced = {key(row) for row in new}
    return [row for row in kept if key(row) not in replaced] + new


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
    file = results_folder(given.quick) / "equal_bytes.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    rows: list[dict[str, Any]] = []
    for model in given.models:
        for bits in given.bits:
            rows += cells(model, ways, bits, judge)
            whole = joined(kept, rows)
            save("equal_bytes", TITLE, whole, render(whole), given.quick)


if __name__ == "__main__":
    main()
