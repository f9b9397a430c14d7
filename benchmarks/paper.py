"""The paper's experiments on any model with one command: perplexity by method and bits, γ, budgets, maps.

    python benchmarks/paper.py MODEL -o OUT [--bits 2,2.5,3,3.5] [--text FILE ...] [--calibration FILE] [--gptq]

Compared at the same bytes: uniform bits, PMQ (which sees the calibration text), AlphaQ as published, and our rule; with
rounding that needs no data and, with --gptq, with GPTQ on the calibration text, as in the paper. Roles beside the
experts have the same widths there; what our default makes of all roles in the same bytes is a table of its own. Then γ
(of the method `alphaq`) and one budget for each block at the smallest of the bits, and one choice for all experts of a
layer. Models that do not fit into memory are evaluated layer by layer, in every table. A run that was stopped goes on.
Figures that the paper gives for the model stand beside ours: on WikiText-2, so give its test set with --text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import HERE, machine, markdown_table, parser, versions

if TYPE_CHECKING:
    from alphaq.calibration.text import Text
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.plan import Plan
    from alphaq.nouns.scoring import Scoring
    from alphaq.planning import Request
    from alphaq.trials.results import Row
    from alphaq.writing.rounding import Rounding

TEXT = HERE.parent / "src" / "alphaq" / "data" / "texts" / "tech.txt"
MAIN, METHODS_TITLE = "methods", "Methods, of the experts alone"
Roles = Literal["fixed", "shared"]
METHODS = ("uniform", "pmq", "paper", "auto")
CALLED = {"uniform": "uniform", "pmq": "PMQ", "paper": "AlphaQ as published", "auto": "ours"}
GAMMAS = (0, 1, 2, 5, 10, 20, 50, 200)
BY_BLOCK = "paper:per_layer=true"
LAYERWISE = "paper, one choice for a layer"
PUBLISHED: dict[str, dict[str, dict[float, float]]] = {
    "deepseek-v2-lite": {
        "reference": {16: 6.31},
        "uniform": {2.5: 8.14, 3.5: 6.83},
        "pmq": {2.5: 6.95, 3.5: 6.57},
        "paper": {2.5: 6.64, 3.5: 6.44},
    },
    "qwen1.5-moe": {
        "reference": {16: 7.22},
        "uniform": {2.5: 10.36, 3.5: 8.13},
        "pmq": {2.5: 9.01, 3.5: 7.42},
        "paper": {2.5: 8.14, 3.5: 7.38},
    },
    "mixtral-8x7b": {
        "reference": {16: 3.84},
        "uniform": {2.5: 6.16, 3.5: 4.29},
        "pmq": {2.5: 5.32, 3.5: 4.25},
        "paper": {2.5: 5.17, 3.5: 4.23},
    },
}
"""Perplexity on WikiText-2 in the paper (arXiv 2606.04980), with GPTQ in groups of 128."""


@dataclass(frozen=True)
class Experiment:
    """What is run. calibration: for PMQ and GPTQ. roundings: the first is used for everything but the first table."""

    checkpoint: Checkpoint
    scoring: Scoring
    bits: tuple[float, ...]
    calibration: Text
    roundings: tuple[Rounding, ...]
    out: Path

    @property
    def name(self) -> str:
        """The model's, also where its folder is a commit in the hub's cache."""
        from alphaq.checkpoint.hub import model_name

        return model_name(self.checkpoint.folder)

    @contextmanager
    def resources(self) -> Iterator[Resources]:
        """Workers, and what was measured before."""
        from alphaq.measuring.cache import Cache
        from alphaq.measuring.resources import Resources
        from alphaq.terminal import progress
        from alphaq.work.workers import Workers, sensible_count

        identity = {"fingerprint": self.checkpoint.fingerprint, "contents": self.checkpoint.contents()}
        with (
            Cache(self.out / "cache", identity) as cache,
            Workers(sensible_count(self.checkpoint.nbytes), self.checkpoint) as workers,
        ):
            yield Resources(workers, cache, progress)

    def compared(self, name: str, methods: Sequence[str], bits: Sequence[float], roles: Roles = "fixed") -> list[Row]:
        """Rows of methods at the same bytes, kept in a folder of that name; the first table has all roundings."""
        from alphaq.nouns.settings import Budget, PlanConfig
        from alphaq.trials.compare import Comparison, compare

        roundings = self.roundings if name == MAIN else self.roundings[:1]
        config = PlanConfig(budget=Budget(bits=min(bits)), roles=roles)
        with self.resources() as resources:
            comparison = Comparison(methods, bits, config, self.calibration, roundings)
            return compare(self.checkpoint, comparison, self.scoring, self.out / name, resources)

    def request(self, method: str, size_bytes: int, layerwise: bool = False) -> Request:
        """A method's request at a budget. layerwise: a layer's experts share one choice."""
        from alphaq.nouns.settings import Budget, PlanConfig
        from alphaq.planning import resolve
        from alphaq.trials.compare import variant_of

        request = resolve(variant_of(PlanConfig(budget=Budget(size_bytes=size_bytes), roles="fixed"), method))
        return replace(request, profile=replace(request.profile, unit="layer")) if layerwise else request

    def plan(self, request: Request, resources: Resources) -> Plan:
        """The plan of a request, measured for as far as the cache does not know."""
        from alphaq.planning import PlanInputs, checked_plan, measure_for_plan

        text = self.calibration if request.method.needs_text else None
        measured = measure_for_plan(self.checkpoint, request, PlanInputs(text=text), resources)
        return checked_plan(self.checkpoint, request, measured, resources)


def layerwise(run: Experiment, rows: Sequence[Row]) -> list[Row]:
    """The paper's rule with one choice for all experts of a layer, at the bytes of each row of `uniform`."""
    from alphaq.trials.results import Entry, rows_of
    from alphaq.work.journal import Journal

    budgets = {row.bits: row.budget_bytes for row in rows if row.method == "uniform"}
    with Journal(run.out / MAIN / "layerwise.jsonl") as journal:  # of this run, as that folder's comparison is
        known = map(Entry.model_validate, journal.entries)
        entries = [entry for entry in known if budgets.get(entry.bits) == entry.budget_bytes]
        missing = budgets.keys() - {entry.bits for entry in entries}
        for entry in _tried(run, {bits: budgets[bits] for bits in sorted(missing)}):
            entries.append(entry)
            journal.append(entry.model_dump(exclude_none=True))
    return rows_of(sorted(entries, key=lambda entry: entry.bits), str(run.roundings[0]))


def _tried(run: Experiment, budgets: dict[float, int]) -> Iterator[Any]:
    from tempfile import TemporaryDirectory

    from alphaq.errors import BudgetError
    from alphaq.evaluation.fidelity import read_texts, score_texts, window_beginning
    from alphaq.trials.results import Entry
    from alphaq.trials.trial import Trials

    if not budgets:
        return
    scoring, first = run.scoring, run.roundings[0]
    score = partial(score_texts, texts=read_texts(scoring.texts), scoring=scoring)
    with run.resources() as resources, TemporaryDirectory(dir=run.out) as scratch:
        trials = Trials(run.checkpoint, score, Path(scratch) / "trials", scoring, resources.wrap, resources.workers)
        common = Entry(
            method=LAYERWISE,
            bits=0,
            rounding=str(first),
            quantizer=first.name,
            budget_bytes=0,
            windows_begin_with=window_beginning(trials.tokenizer, scoring.bos),
            layer_by_layer=bool(scoring.stream),
        )
        for bits, size_bytes in budgets.items():
            entry = common.model_copy(update={"bits": bits, "budget_bytes": size_bytes})
            try:
                plan = run.plan(run.request("paper", size_bytes, layerwise=True), resources)
            except BudgetError as error:
                yield entry.model_copy(update={"error": str(error)})
                continue
            figures = {"size_bytes": plan.size_bytes, "bits_per_weight": plan.bits_per_weight}
            yield Entry.model_validate(entry.model_dump() | figures | trials.run(plan, first))


def draw(run: Experiment, rows: Sequence[Row]) -> list[str]:
    """Figures of methods and γ, and a map of bits for each method; none where matplotlib is not installed."""
    from alphaq.errors import MissingExtraError
    from alphaq.report import plots
    from alphaq.report.places import place_by_name
    from alphaq.report.runs import read_comparison

    try:
        plots.require_matplotlib()
    except MissingExtraError as error:
        sys.stderr.write(f"no figures: {error}\n")
        return []
    figures = {
        "methods.svg": plots.methods_figure([("methods", read_comparison(run.out / MAIN))], "perplexity"),
        "gamma.svg": plots.gamma_figure([("gamma", read_comparison(run.out / "gamma"))], "perplexity"),
    }
    smallest = min(run.bits)
    with run.resources() as resources:
        for row in rows:
            if row.bits == smallest and row.method in METHODS and not row.error:
                bits = run.plan(run.request(row.method, row.budget_bytes), resources).assignment
                places = {name: place_by_name(name) for name in bits}
                figures[f"bits-{row.method}-{smallest:g}.svg"] = plots.bits_figure(bits, places)
    for name, figure in figures.items():
        plots.save(figure, run.out / name, "svg", 150)
    return list(figures)


def published_of(name: str) -> dict[str, dict[float, float]]:
    """What the paper gives for a model, by method and bits; nothing for others."""
    return next((figures for key, figures in PUBLISHED.items() if key in name.lower()), {})


def render(run: Experiment, tables: dict[str, list[Row]]) -> str:
    """All tables as Markdown."""
    known = published_of(run.name)
    header = ["method", "bits", "quantizer", "bytes", "perplexity", "in the paper", "KL", "top-1 %", "EAR"]

    def lines(rows: Sequence[Row]) -> Iterator[list[object]]:
        for row in rows:
            called = CALLED.get(row.method, row.method)
            if row.error:
                yield [called, f"{row.bits:g}", row.quantizer, row.error, *["–"] * 5]
                continue
            there = known.get(row.method, {}).get(row.bits)
            yield [
                called,
                f"{row.bits:g}",
                row.quantizer or "–",
                f"{row.size_bytes:,}",
                f"{row.mean_perplexity:.3f}",
                "–" if there is None else f"{there:.2f}",
                f"{row.kl:.4f}",
                f"{100 * (row.top1 or 0):.1f}",
                f"{row.ear:.4f}",
            ]

    parts = [f"## {title}\n\n{markdown_table(header, lines(rows))}" for title, rows in tables.items()]
    about = (
        f"# The paper's experiments on {run.name}\n\nPerplexity and distances on "
        f"{', '.join(path.name for path in run.scoring.texts)}; the paper's on WikiText-2 with GPTQ. "
        "Every row of one width has the same budget for its weight files, scales included. Models were run "
        f"{'layer by layer from disk' if run.scoring.stream else 'in memory'}. Not run: zero-shot tasks, decode speed."
    )
    return "\n\n".join([about, *parts]) + "\n"


def budgets_of(text: str) -> tuple[float, ...]:
    """Bits from small to large. Raises BudgetError."""
    from alphaq.errors import BudgetError

    try:
        return tuple(sorted({float(one) for one in text.split(",")}))
    except ValueError:
        raise BudgetError(f"--bits {text!r} is not a list of numbers. Write for example --bits 2,2.5,3.") from None


def experiment(given: argparse.Namespace) -> Experiment:
    """What was asked for."""
    from alphaq.calibration.text import Text
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.nouns.scoring import Scoring
    from alphaq.terminal import note
    from alphaq.trials.compare import as_begun
    from alphaq.trials.trial import settled
    from alphaq.writing.rounding import Rounding, enough_tokens

    checkpoint = open_checkpoint(given.model)
    source: Any = given.calibration or "self"
    text = Text(source, given.calibration_tokens)
    roundings = [Rounding.of("native")]
    if given.gptq:
        tokens = given.calibration_tokens or enough_tokens(checkpoint)
        roundings.append(Rounding.of("native", "gptq", replace(text, tokens=tokens)))
    wanted = Scoring(
        texts=tuple(given.text or [TEXT]),
        max_tokens=given.max_tokens,
        skip_tokens=given.skip_tokens,
        device=given.device,
    )
    bits = budgets_of(given.bits)
    scoring, why = settled(as_begun(wanted, given.output / MAIN), checkpoint, max(bits))
    if why:
        note(why)
    return Experiment(checkpoint, scoring, bits, text, tuple(roundings), given.output)


def tables_of(run: Experiment, gammas: Sequence[float]) -> dict[str, list[Row]]:
    """All rows by the title of their table. Raises OutputError where OUT holds those of something else."""
    smallest = min(run.bits)
    rows = run.compared(MAIN, METHODS, run.bits)
    by_gamma = run.compared("gamma", [f"alphaq:gamma={gamma}" for gamma in gammas], [smallest])
    return {
        METHODS_TITLE: rows,
        "All roles in the same bytes": run.compared("roles", ["uniform", "auto"], run.bits, "shared"),
        f"γ at {smallest:g} bits, method alphaq": by_gamma,
        f"One budget for each block at {smallest:g} bits": run.compared("blocks", ["paper", BY_BLOCK], [smallest]),
        "One choice for all experts of a layer": layerwise(run, rows),
    }


def arguments_of() -> argparse.Namespace:
    """The command line."""
    arguments = parser(__doc__)
    arguments.add_argument("model", help="folder or hub id")
    arguments.add_argument("-o", "--output", type=Path, required=True, help="folder for results; goes on where it was")
    arguments.add_argument("--bits", default="2,2.5,3,3.5", help="bits per expert weight, comma-separated")
    arguments.add_argument("--text", type=Path, nargs="+", help="UTF-8 texts; a bundled one by default")
    arguments.add_argument("--max-tokens", type=int, default=16_384, help="of each text")
    arguments.add_argument("--skip-tokens", type=int, default=0, help="at the start of each text")
    arguments.add_argument("--calibration", type=Path, help="text for PMQ and GPTQ; the model's own by default")
    arguments.add_argument("--calibration-tokens", type=int, default=16_384, help="of that text")
    arguments.add_argument("--gptq", action="store_true", help="with GPTQ too")
    arguments.add_argument("--device", help="where models are run in memory: cpu, cuda")
    return arguments.parse_args()


def main() -> None:
    """Run what is missing, and write OUT/paper.md, OUT/paper.json and the figures."""
    from alphaq.errors import AlphaQError

    given = arguments_of()
    given.output.mkdir(parents=True, exist_ok=True)
    try:
        run = experiment(given)
        tables = tables_of(run, GAMMAS[:3] if given.quick else GAMMAS)
        drawn = draw(run, tables[METHODS_TITLE])
    except AlphaQError as error:
        sys.exit(str(error))
    told = render(run, tables) + "".join(f"\n![{name}]({name})\n" for name in drawn)
    (run.out / "paper.md").write_text(told, encoding="utf-8")
    content = {
        "model": run.name,
        "machine": machine(),
        "versions": versions(),
        "published": published_of(run.name),
        "tables": {title: [vars(row) for row in rows] for title, rows in tables.items()},
    }
    (run.out / "paper.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(told)


if __name__ == "__main__":
    main()
