"""GGUF files of the same size: llama.cpp's stock mixes and ours, by how far llama.cpp's own output moves.

python benchmarks/gguf_mixes.py [MODEL] [--text FILE ...] [--imatrix-text FILE] [--recipes Q2_K ...]

Stock mixes are made by llama.cpp's own quantizer (`llama_quantize.py`). The importance matrix that people use is made
of a text that is not scored. All of a model is done in one process, so that what was measured serves for every size;
each row names the command that makes the same file, where `whole.gguf` and `text.gguf` lie, and the one that scores it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from common import HERE, markdown_table, parser, save

from alphaq import pipeline
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix, read_imatrix
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.gguf.forward import LlamaModel
from alphaq.engines.gguf.gathering import Sample, gather_apart
from alphaq.engines.gguf.importance_file import write_imatrix
from alphaq.evaluation.fidelity import Remembered, evaluate_texts
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import PlanInputs, make_plan, measure_for_plan, resolve
from alphaq.work.cores import available_cores
from alphaq.work.workers import silent
from alphaq.writing.observing import importance_by_losses, in_16_bits

RECIPES = ("Q2_K", "IQ2_M", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M")
IMATRIX_TOKENS = 16_384
MAX_TOKENS = 2048
SCORED_CHARACTERS = 60_000
"""At the end of each text, of which MAX_TOKENS tokens are scored."""
STOCK, STOCK_TEXT = "stock", "stock, text"
OURS = ("none", "self", "text")
ABOUT = """\
KL in nats per token against the 16-bit file, by llama.cpp itself, the mean over the texts. *stock*: what
`llama-quantize` writes, without an importance matrix and with one of a text that is not scored; the rest: `alphaq
quantize --engine llama.cpp --no-check` in the bytes of *stock, text*, header and tokenizer included, by `--imatrix`.
–: llama.cpp refuses the mix without an importance matrix, or not run. In brackets: how much larger the file is."""


@dataclass(frozen=True)
class Row:
    """One file."""

    model: str
    recipe: str
    column: str
    size_bytes: int
    kl: float
    texts: dict[str, float]
    commands: tuple[str, str]


@dataclass(frozen=True)
class Judge:
    """What files are compared with. reference: the 16-bit file, which runs each window once. texts: by name."""

    reference: Remembered
    texts: dict[str, str]
    tokens: int

    def kl(self, file: Path) -> dict[str, float]:
        """Of each text, in nats per token."""
        scoring = Scoring(texts=tuple(map(Path, self.texts)), max_tokens=self.tokens)
        with LlamaModel(file, scoring.window) as model:
            found = dict(evaluate_texts(model, model.tokenizer, self.texts, scoring, self.reference))
        return {name: round(one.kl, 6) for name, one in found.items() if one.kl is not None}


@dataclass(frozen=True)
class Bench:
    """One model in a scratch folder. given: importance matrices by the name of ours that goes by them. choices: types
    that ours may have, by names with commas; None for all."""

    name: str
    checkpoint: Checkpoint
    folder: Path
    judge: Judge
    given: dict[str, ImportanceMatrix | None]
    resources: Resources
    choices: str | None = None

    def row(self, recipe: str, column: str, size: int = 0) -> Row | None:
        """Make and score one file; None where llama.cpp refuses."""
        file = self._stock(recipe, column) if column not in OURS else self._ours(column, size)
        if file is None:
            return None
        size = file.stat().st_size
        by_text = self.judge.kl(file)
        file.unlink()
        kl = sum(by_text.values()) / len(by_text)
        row = Row(self.name, recipe, column, size, kl, by_text, self._commands(recipe, column, size))
        sys.stderr.write(f"{self.name} {recipe} {column}: {size:,} bytes, KL {kl:.5f}\n")
        return row

    def _stock(self, recipe: str, column: str) -> Path | None:
        script, *words = self._commands(recipe, column, 0)[0].split()[1:]
        command = [sys.executable, str(HERE.parent / script), *words, "--threads", str(available_cores())]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode and "requires an imatrix" not in done.stderr:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return None if done.returncode else self.folder / "out.gguf"

    def _ours(self, column: str, size: int) -> Path:
        given = self.given[column]
        named = None if given is None else f"{given.name} {given.digest}"
        config = PlanConfig(budget=Budget(size_bytes=size), engine="llama.cpp", imatrix=named, choices=self.choices)
        request = resolve(config)
        measured = measure_for_plan(self.checkpoint, request, PlanInputs(imatrix=given), self.resources)
        plan = make_plan(self.checkpoint, request, measured)
        options = pipeline.WriteOptions(imatrix=given, check=False)
        with TemporaryDirectory(dir=self.folder) as scratch:
            pipeline.quantize(self.checkpoint, plan, Path(scratch) / "out", options, self.resources)
            return (Path(scratch) / "out" / "model.gguf").replace(self.folder / "out.gguf")

    def _commands(self, recipe: str, column: str, size: int) -> tuple[str, str]:
        texts = " ".join(f"--text {text}" for text in self.judge.texts)
        score = f"alphaq eval out.gguf --reference whole.gguf {texts} --max-tokens {self.judge.tokens}"
        if column in OURS:
            imatrix = "text.gguf" if column == "text" else column
            choices = "" if self.choices is None else f" --choices {self.choices}"
            options = f"--engine llama.cpp --size {size} --imatrix {imatrix}{choices} --no-check"
            return f"alphaq quantize MODEL {options} -o out", score.replace("out.gguf", "out/model.gguf")
        by_text = " --imatrix text.gguf" if column == STOCK_TEXT else ""
        return f"python benchmarks/llama_quantize.py whole.gguf out.gguf {recipe}{by_text}", score

    def rows(self, recipe: str) -> Iterator[Row]:
        """All columns of a recipe, the one first that says how large ours may be, then what is compared most."""
        stock = self.row(recipe, STOCK_TEXT)
        assert stock is not None  # llama.cpp refuses only without an importance matrix
        yield stock
        for column in ("self", "none", "text", STOCK):
            row = self.row(recipe, column, stock.size_bytes)
            if row is not None:
                yield row


def prepared(folder: Path, model: Path, imatrix_text: Path) -> tuple[Checkpoint, dict[str, ImportanceMatrix | None]]:
    """The model, its 16-bit file `whole.gguf` in the folder, and importance matrices, that of the text in a file."""
    checkpoint = open_checkpoint(model)
    (folder / "whole.gguf").symlink_to(in_16_bits(checkpoint, folder).absolute())
    sample = Sample((imatrix_text,), IMATRIX_TOKENS)
    gathered = gather_apart(folder / "whole.gguf", sample, available_cores(), silent)
    write_imatrix(folder / "text.gguf", gathered, (imatrix_text.name,))
    return checkpoint, {"none": None, "text": read_imatrix(folder / "text.gguf")}


def rendered(rows: Sequence[Row]) -> str:
    """The table."""
    header = ("model, size of", "MiB", STOCK, STOCK_TEXT, *OURS, "self ÷ none", "self ÷ stock, text")
    by_place: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_place.setdefault((row.model, row.recipe), {})[row.column] = row
    lines = []
    for (model, recipe), found in by_place.items():
        base, own = found[STOCK_TEXT], found.get("self")
        cells = [_cell(found.get(column), base) for column in (STOCK, STOCK_TEXT, *OURS)]
        ratios = [_ratio(own, found.get("none")), f"**{_ratio(own, base)}**"]
        lines.append((f"{model}, {recipe}", f"{base.size_bytes / 2**20:.2f}", *cells, *ratios))
    return ABOUT + "\n\n" + markdown_table(header, lines)


def _ratio(own: Row | None, other: Row | None) -> str:
    return "–" if own is None or other is None else f"{own.kl / other.kl:.2f}"


def _cell(row: Row | None, base: Row) -> str:
    if row is None:
        return "–"
    larger = row.size_bytes / base.size_bytes - 1
    return f"{row.kl:.5f}" + (f" ({larger:+.1%})" if larger >= 0.001 else "")


def main() -> None:
    """One model, every recipe."""
    bundled = Path(str(files("alphaq") / "data"))
    arguments = parser(__doc__)
    arguments.add_argument("model", nargs="?", type=Path, default=bundled / "tiny", help="folder or 16-bit GGUF file")
    arguments.add_argument("--text", nargs="+", type=Path, default=sorted((bundled / "texts").glob("[ct]*.txt")))
    arguments.add_argument("--imatrix-text", type=Path, default=bundled / "texts" / "dict.txt")
    arguments.add_argument("--recipes", nargs="+", default=list(RECIPES))
    arguments.add_argument("--choices", help="types that ours may have; all by default")
    arguments.add_argument("--tokens", type=int, default=MAX_TOKENS, help="of each text that are scored")
    given = arguments.parse_args()
    tokens, recipes = (512, given.recipes[:1]) if given.quick else (given.tokens, given.recipes)
    name = given.model.stem
    texts = {text.name: text.read_text(encoding="utf-8")[-SCORED_CHARACTERS:] for text in given.text}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint, matrices = prepared(folder, given.model, given.imatrix_text)
        with (
            Cache(folder, {"fingerprint": checkpoint.fingerprint}) as cache,
            LlamaModel(folder / "whole.gguf", Scoring(texts=()).window) as whole,
        ):
            resources = Resources(cache=cache)
            own = importance_by_losses(checkpoint, resources)
            judge = Judge(Remembered(whole), texts, tokens)
            bench = Bench(name, checkpoint, folder, judge, matrices | {"self": own}, resources, given.choices)
            rows: list[Row] = []
            for row in (row for recipe in recipes for row in bench.rows(recipe)):
                rows.append(row)  # saved at once: a large model takes hours, and what is done counts
                title = f"{name}: GGUF at equal size"
                save(f"gguf_mixes_{name}", title, list(map(asdict, rows)), rendered(rows), given.quick)


if __name__ == "__main__":
    main()
