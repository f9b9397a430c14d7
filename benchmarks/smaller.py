"""What coded files and sliced models cost: bytes and KL beside fixed-length files, on trained models.

    python benchmarks/smaller.py MODEL [MODEL ...] --text TEXT [TEXT ...] [--max-tokens 4096] [--skip-tokens 0]

Coded: at each width, a fixed-length plan (method auto); the same files coded (the same weights), also with GPTQ on the
model's own writing; and coded plans of 0.9 and 0.8 of the fixed-length bytes, both ways. Sliced: a nested 4-bit
artifact cut down, beside models quantized directly by the same plan and by a plan of the same bytes with the usual
choices.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import SCRATCH, markdown_table, parser, results_folder, save

TITLE = "Coded files and sliced models"
WIDTHS = (2.0, 3.0, 4.0)
SHARES = (0.9, 0.8)
SLICES = (3.0, 2.5, 2.0)


class Bench:
    """One model, its reference, and folders of quantized forms that are scored and dropped."""

    def __init__(self, model: Path, texts: list[Path], max_tokens: int, skip_tokens: int, scratch: Path) -> None:
        from alphaq.checkpoint.reader import open_checkpoint
        from alphaq.evaluation.fidelity import Remembered, read_texts
        from alphaq.nouns.scoring import Scoring
        from alphaq.runtime.loading import load_model

        self.model, self.scratch = model, scratch
        self.checkpoint = open_checkpoint(model)
        self.reference_model, self.tokenizer = load_model(model, "float32")
        self.reference = Remembered(self.reference_model)
        self.texts = read_texts(texts)
        self.scoring = Scoring(max_tokens=max_tokens, skip_tokens=skip_tokens)

    def plan(self, checkpoint: Any = None, **settings: Any) -> Any:
        """A plan, measured for as the command line does."""
        from alphaq.measuring.cache import Cache
        from alphaq.measuring.resources import Resources
        from alphaq.nouns.settings import PlanConfig
        from alphaq.planning import make_plan, measure_for_plan, resolve

        source = checkpoint or self.checkpoint
        fast = not {"codec", "choices"} & settings.keys()  # plain groups: trellis codes have nothing to be coded
        request = resolve(PlanConfig(fast=fast, **settings))
        identity = {"fingerprint": source.fingerprint, "contents": source.contents()}
        with Cache(self.scratch / "cache", identity) as cache:
            return make_plan(source, request, measure_for_plan(source, request, resources=Resources(cache=cache)))

    def quantized(self, plan: Any, name: str, checkpoint: Any = None, quantizer: str | None = None) -> Path:
        """The folder that a plan makes."""
        from alphaq import pipeline
        from alphaq.writing.rounding import Rounding

        folder = self.scratch / name
        rounding = Rounding.of("native", quantizer)
        pipeline.quantize(
            checkpoint or self.checkpoint, plan, folder, pipeline.WriteOptions(rounding=rounding, check=False)
        )
        return folder

    def row(self, kind: str, folder: Path) -> dict[str, Any]:
        """Bytes of a folder's weight files, of its experts, and KL over the texts."""
        from alphaq.engines.output import Output
        from alphaq.evaluation.fidelity import score_texts, summarize_windows
        from alphaq.runtime.loading import load_model

        model, _ = load_model(folder, "float32")
        scores = dict(score_texts(model, self.tokenizer, self.texts, self.scoring, self.reference))
        found = [summarize_windows(one, True) for one in scores.values()]
        output = Output(folder)
        planned = {matrix.name for matrix in self.checkpoint.planned}
        return {
            "model": self.model.name,
            "kind": kind,
            "size_bytes": sum((folder / file).stat().st_size for file in output.headers),
            "expert_bytes": sum(output.stored[name].place.nbytes for name in planned),
            "bits_per_weight": output.plan.bits_per_weight,
            "kl": sum(text.kl or 0.0 for text in found) / len(found),
        }


def coded(bench: Bench, width: float) -> list[dict[str, Any]]:
    """Fixed-length, coded, and coded in less."""
    from alphaq.nouns.settings import Budget
    from alphaq.writing.recoding import recode

    folder = bench.quantized(bench.plan(budget=Budget(bits=width)), f"fixed-{width:g}")
    rows = [bench.row(f"{width:g} bits", folder)]
    recode(folder, bench.scratch / f"coded-{width:g}", "zstd")
    rows.append(bench.row(f"{width:g} bits, coded", bench.scratch / f"coded-{width:g}"))
    rows.append(calibrated(bench, width))
    for share in SHARES:
        size = int(share * rows[0]["size_bytes"])
        plan = bench.plan(budget=Budget(size_bytes=size), codec="zstd")
        for quantizer in (None, "gptq"):
            folder = bench.quantized(plan, f"plan-{width:g}-{share:g}-{quantizer}", quantizer=quantizer)
            kind = f"{width:g} bits' bytes, {share:g} of them, --codec zstd"
            rows.append(bench.row(kind + (f" --quantizer {quantizer}" if quantizer else ""), folder))
    return rows


def calibrated(bench: Bench, width: float) -> dict[str, Any]:
    """The fixed-length plan rounded by GPTQ on the model's own writing, then coded."""
    from alphaq.nouns.settings import Budget
    from alphaq.writing.recoding import recode

    folder = bench.quantized(bench.plan(budget=Budget(bits=width)), f"gptq-{width:g}", quantizer="gptq")
    recode(folder, bench.scratch / f"gptq-coded-{width:g}", "zstd")
    return bench.row(f"{width:g} bits --quantizer gptq, coded", bench.scratch / f"gptq-coded-{width:g}")


def sliced(bench: Bench) -> list[dict[str, Any]]:
    """An artifact, its slices, and what direct quantization makes of the same bytes."""
    from alphaq.nouns.settings import Budget, Rule
    from alphaq.writing.artifact import nested_choices, open_artifact, own_pins

    direct4 = bench.quantized(bench.plan(budget=Budget(bits=4.0), choices="4g128"), "direct-4")
    artifact = bench.quantized(bench.plan(budget=Budget(bits=4.0), choices="4g128-nest"), "nested-4")
    rows = [bench.row("4g128", direct4), bench.row("4g128-nest, the artifact", artifact)]
    opened, held = open_artifact(artifact)
    for width in SLICES:
        pins = tuple(Rule.parse(pin, "--pin") for pin in own_pins(opened, held))
        plan = bench.plan(opened, budget=Budget(bits=width), choices=nested_choices(opened, held), pins=pins)
        begin = time.perf_counter()
        folder = bench.quantized(plan, f"slice-{width:g}", opened)
        seconds = time.perf_counter() - begin
        rows.append(bench.row(f"{width:g} bits, sliced", folder) | {"seconds": seconds})
        same = plan.model_copy(update={"source": None, "size_bytes": None, "table": None})
        rows.append(bench.row(f"{width:g} bits, the same plan directly", bench.quantized(same, f"same-{width:g}")))
        usual = bench.plan(budget=Budget(bits=width))
        rows.append(bench.row(f"{width:g} bits, the usual choices", bench.quantized(usual, f"usual-{width:g}")))
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    header = ["model", "files", "bytes", "of experts", "bits/weight", "KL"]
    table = [
        [
            row["model"],
            row["kind"],
            f"{row['size_bytes']:,}",
            f"{row['expert_bytes']:,}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['kl']:.5f}",
        ]
        for row in rows
    ]
    return markdown_table(header, table)


def main() -> None:
    """Run, show and keep."""
    arguments = parser(__doc__)
    arguments.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    arguments.add_argument("--text", type=Path, nargs="+", required=True)
    arguments.add_argument("--max-tokens", type=int, default=4096, help="of each text")
    arguments.add_argument("--skip-tokens", type=int, default=0, help="of each text")
    arguments.add_argument("--add", action="store_true", help="keep the results of other models")
    given = arguments.parse_args()
    SCRATCH.mkdir(exist_ok=True)
    kept = results_folder(given.quick) / "smaller.json"
    names = {model.name for model in given.models}
    rows: list[dict[str, Any]] = []
    if given.add:
        rows = [row for row in json.loads(kept.read_text(encoding="utf-8"))["rows"] if row["model"] not in names]
    for model in given.models:
        with TemporaryDirectory(dir=SCRATCH) as scratch:
            bench = Bench(model, given.text, given.max_tokens, given.skip_tokens, Path(scratch))
            for part in (*(partial(coded, bench, width) for width in WIDTHS), partial(sliced, bench)):
                rows += part()
                save("smaller", TITLE, rows, render(rows), given.quick)


if __name__ == "__main__":
    main()
