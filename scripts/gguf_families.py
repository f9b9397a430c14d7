"""Quantize a GGUF file of every family of experts that llama.cpp's converter takes: `make gguf-families`.

A tiny random model of transformers, with the settings, names and tokenizer that published ones have (tests/
gguf_models.py) → llama.cpp's own converter → a 16-bit file → `alphaq quantize` with mixed types → llama.cpp loads it.
Its logits are compared with those of the 16-bit file and, so that an error of ours cannot hide behind that of
quantizing, with those of the same file whose weights were restored to 16 bits. llama.cpp ends the process where it
asserts, so each family has one of its own, with a limit. The table goes to docs/engines/gguf-families.md.

    python scripts/gguf_families.py [FAMILY ...]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # where llama.cpp asserts, it would start a debugger

import numpy as np

import alphaq
from alphaq.checkpoint.gguf.format import GgufFile, layout, read_gguf
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf.library import Llama
from alphaq.engines.gguf.profile import FILE_NAME
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.formats.ggml_library import restore_rows
from alphaq.nouns.settings import Budget, PlanConfig

ROOT = Path(__file__).parents[1]
TOKENS = 24
KEPT_SHARE = 0.6  # of the 16-bit file's bytes that the quantized one may take, so that types mix
CHOICES = "Q2_K,Q3_K,Q4_K,Q6_K,Q4_0,Q4_1,Q5_1,Q8_0"  # quick ones; every type is tested by itself
LIMIT_S = 300  # of running a family
AT_ONCE = 2
ROUNDING = 0.5  # of the change by quantizing; llama.cpp rounds the inputs of quantized weights to 8 bits
DENSE = ("gemma2", "glm4", "llama", "qwen3")
ONE_ROW = "--one"
HEAD = """Every family of experts of transformers that llama.cpp's converter has a class for, and some dense ones: a
tiny random model with the settings, names of tensors and kind of tokenizer that published ones have → llama.cpp's own
converter → a 16-bit file → `alphaq quantize` to 60 % of its bytes with mixed types → llama.cpp loads it. Its logits are
compared with those of the 16-bit file and, so that an error of ours cannot hide behind that of quantizing, with those
of the same file whose weights were restored, which must be less than half as far away: llama.cpp rounds the inputs of
quantized weights to 8 bits. KL in nats per token; the models are random, so that every error shows.
"""


@dataclass(frozen=True)
class Row:
    """What became of one family. types: how many tensors of each are in the file. exact: KL to the restored weights;
    change: KL to the 16-bit file, both in nats. why: what kept it from being run, "" if nothing did."""

    family: str
    arch: str = ""
    types: str = ""
    kept: str = ""
    exact: float = 0.0
    change: float = 0.0
    why: str = ""


def quantize(source: Path, out: Path, share: float = KEPT_SHARE, method: str = "alphaq") -> None:
    """Quantize a GGUF file to a share of its bytes. Raises AlphaQError."""
    from alphaq import pipeline
    from alphaq.planning import resolve

    stored = {tensor.type for tensor in read_gguf(source).tensors.values()}
    checkpoint = open_checkpoint(source, quantized=not stored.isdisjoint(GGML_BLOCKS))
    config = PlanConfig(
        budget=Budget(size_bytes=int(source.stat().st_size * share)), engine="llama.cpp", method=method, choices=CHOICES
    )
    request = resolve(config).with_stored(checkpoint)
    plan = pipeline.make_plan(checkpoint, request, pipeline.measure_for_plan(checkpoint, request))
    pipeline.quantize(checkpoint, plan, out)


def logits(path: Path) -> np.ndarray:
    """llama.cpp's for a fixed row of tokens, float64 [tokens, words]. Raises LlamaError."""
    ids = np.random.default_rng(0).integers(3, 256, TOKENS).tolist()
    with Llama(path, context=TOKENS) as model:
        return model.logits(ids).astype(np.float64)


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(one ‖ other) of the tokens, in nats."""
    first, second = (values - np.logaddexp.reduce(values, axis=-1, keepdims=True) for values in (one, other))
    return float((np.exp(first) * (first - second)).sum(axis=-1).mean())


def restore(path: Path, out: Path) -> Path:
    """The same file with every quantized tensor in F32, by llama.cpp's own code."""
    file = read_gguf(path)
    types = {
        name: ("F32" if tensor.type in GGML_BLOCKS else tensor.type, tensor.shape)
        for name, tensor in file.tensors.items()
    }
    header, places, nbytes = layout(file.metadata, types)
    with out.open("wb") as written:
        written.write(header)
        written.truncate(nbytes)
        for name, place in places.items():
            written.seek(place.begin)
            written.write(values_of(file, name, file.tensors[name].type != place.type))
    return out


def values_of(file: GgufFile, name: str, decode: bool) -> bytes:
    """The bytes of a tensor, decoded to float32 if asked for."""
    tensor = file.tensors[name]
    with (file.folder / tensor.file).open("rb") as source:
        source.seek(tensor.begin)
        raw = source.read(tensor.nbytes)
    if not decode:
        return raw
    codes = np.frombuffer(raw, np.uint8).reshape(int(np.prod(tensor.shape[:-1])), -1)
    return restore_rows(codes, tensor.type, tensor.shape[-1]).tobytes()


def rows_of(family: str, source: Path) -> Iterator[Row]:
    """What is known of a family so far; `why` says who has the word until the next row. The last one counts."""
    row = Row(family, str(read_gguf(source).metadata["general.architecture"].value))
    yield replace(row, why="llama.cpp cannot")
    reference = logits(source)
    yield replace(row, why="our own error")
    quantize(source, out := source.with_suffix(".out"))
    yield replace(row, why="llama.cpp cannot run the quantized file")
    found, restored = logits(out / FILE_NAME), logits(restore(out / FILE_NAME, source.with_suffix(".f32.gguf")))
    row = replace(row, exact=divergence(restored, found), change=divergence(reference, found))
    counts = Counter(tensor.type for tensor in read_gguf(out / FILE_NAME).tensors.values())
    types = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if name in GGML_BLOCKS)
    kept = "; ".join(open_checkpoint(out / FILE_NAME, quantized=True).notes)
    same = np.isfinite([row.exact, row.change]).all() and row.exact < ROUNDING * row.change
    yield replace(row, types=types, kept=kept, why="" if same else "the logits are not those of the restored weights")


def tell(family: str, source: Path) -> None:
    """Print the rows of a family, the last of which names the error if there is one."""
    row = Row(family, why="our own error")
    try:
        for row in rows_of(family, source):
            print(json.dumps(vars(row)), flush=True)
    except Exception as error:  # whatever it is, it is the family's cell
        print(json.dumps(vars(replace(row, why=f"{row.why}: {short(error)}"))))


def row_of(family: str, source: Path) -> Row:
    """Quantize and run one converted family in a process of its own, since llama.cpp ends one where it asserts."""
    with source.with_suffix(".words").open("w+") as words:
        child = subprocess.Popen(
            [sys.executable, __file__, ONE_ROW, family, str(source)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
        )
        try:
            told, _ = child.communicate(timeout=LIMIT_S)
            ended = f"the process ended with {child.returncode}" if child.returncode else ""
        except subprocess.TimeoutExpired:
            child.kill()
            told, _ = child.communicate()
            ended = f"it took more than {LIMIT_S} seconds"
        words.seek(0)
        said = words.read()
    row = Row(**json.loads(told.splitlines()[-1])) if told else Row(family, why="our own error")
    return replace(row, why=f"{row.why}: {asserted(said) or ended}") if ended else row


def asserted(words: str) -> str:
    """What llama.cpp asserted when it ended the process, "" if nothing."""
    found = re.findall(r"([\w./-]+:\d+: (?:GGML_ASSERT|fatal error).*)", words)
    return short(found[-1].rpartition("/")[2]) if found else ""


def short(error: BaseException | str) -> str:
    """An error as a cell of a table holds it: of llama.cpp the last words, which name the cause."""
    words = str(error) or type(error).__name__
    words = re.sub(r"/\S+/", "", " ".join(words.split()).replace("|", "/"))  # without a folder that nobody has
    cause = re.findall(r"(?:error loading model:|check_tensor_dims:|key not found).*", words)
    return (cause[-1] if cause else words)[:160]


def without_a_class(families: Sequence[str]) -> list[str]:
    """The families whose class the converter does not have, by the name that the hub gives it."""
    from alphaq.calibration.stream import model_class
    from families import config_of
    from gguf_models import published_class
    from llama_converter import classes

    known = classes()
    return [one for one in families if published_class(one, model_class(config_of(one)).__name__) not in known]


def table(rows: Sequence[Row], unknown: Sequence[str]) -> str:
    """The page."""
    lines = [
        "# Families as GGUF files\n",
        HEAD,
        f"Version {alphaq.__version__}, {date.today()}, `make gguf-families`.\n",
        "| family | architecture | types in the file | KL to restored weights | KL to 16 bits | |",
        "|---|---|---|--:|--:|---|",
    ]
    for row in rows:
        numbers = f"{row.exact:.1e} | {row.change:.2g}" if not row.why else " | "
        lines.append(f"| {row.family} | {row.arch} | {row.types} | {numbers} | {row.why or row.kept or 'ok'} |")
    green = [row.family for row in rows if not row.why]
    dense = sum(family in DENSE for family in green)
    lines.append(
        f"\n{len(green) - dense} families of experts and {dense} dense ones are quantized and run, of {len(rows)} that "
        "the converter has a class for."
    )
    if unknown:
        lines.append(f"\nThe converter has no such model: {', '.join(unknown)}.")
    return "\n".join(lines) + "\n"


def made(families: Sequence[str], scratch: Path) -> dict[str, str]:
    """Write FAMILY.gguf in 16 bits of each family; why there is none, by family."""
    from gguf_models import needs_of, save
    from llama_converter import convert

    refused: dict[str, str] = {}
    folders: dict[tuple[str, ...], list[Path]] = {}
    for family in families:
        try:
            folder = save(family, scratch / family)
        except Exception as error:  # whatever a class of transformers raises, the others are still to be tried
            refused[family] = f"transformers cannot make the tiny model: {short(error)}"
        else:
            folders.setdefault(needs_of(family).flags, []).append(folder)
    for flags, those in folders.items():
        words = convert(those, *flags)
        refused |= {family: f"the converter refuses the tiny model: {short(said)}" for family, said in words.items()}
    return refused


def main(families: Sequence[str]) -> str:
    """The page of some families."""
    unknown = without_a_class(families)
    known = [family for family in families if family not in unknown]
    rows = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(AT_ONCE) as pool:
        refused = made(known, Path(scratch))

        def found(family: str) -> Row:
            if family in refused:
                return Row(family, why=refused[family])
            return row_of(family, Path(scratch) / f"{family}.gguf")

        for row in pool.map(found, known):
            print(row, flush=True)
            rows.append(row)
    return table(rows, unknown)


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE_ROW]:
        tell(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:]:
        print(main(sys.argv[1:]))
    else:
        from families import FAMILIES

        (ROOT / "docs" / "engines" / "gguf-families.md").write_text(main(sorted(FAMILIES)))
