"""The paper's experiments on any model with one command: perplexity, zero-shot tasks, γ, budgets, maps, memory, speed.

    python benchmarks/paper.py MODEL -o OUT [--bits 2,2.5,3,3.5] [--text FILE ...] [--calibration FILE] [--gptq]
        [--tasks NAME,NAME] [--include-path FOLDER] [--limit N]

Compared at the same bytes: uniform bits, PMQ (which sees the calibration text), AlphaQ as published, and our rule; with
rounding that needs no data and, with --gptq, with GPTQ on the calibration text, as in the paper. Codes are plain groups
(`--fast`) and roles beside the experts have the same widths there; what our default makes of the same bytes, of all
roles and with trellis codes, is a table of its own. Then γ
(of the method `alphaq`) and one budget for each block at the smallest of the bits, and one choice for all experts of a
layer. Tasks are lm-eval's (`pip install 'alphaq[eval]'`), of which --include-path may hold other data
(`local_tasks.py`); --tasks none leaves them out. Models that do not fit into memory are evaluated layer by layer, in
every table, and not timed. A run that was stopped goes on. Figures that the paper gives for the model stand beside
ours: perplexity is of WikiText-2 there, so give its test set with --text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import HERE, machine, markdown_table, parser, versions
from paper_models import PROMPT, TASKS, Asked, Finding, findings, speed_table, tasks_table
from paper_published import Published, cell, published_of
from paper_runs import BY_BLOCK, MAIN, METHODS, Experiment, layerwise

if TYPE_CHECKING:
    from alphaq.evaluation.tasks import TaskRequest
    from alphaq.trials.results import Row

TEXT = HERE.parent / "src" / "alphaq" / "data" / "texts" / "tech.txt"
METHODS_TITLE = "Methods, of the experts alone"
CALLED = {"reference": "16 bits", "uniform": "uniform", "pmq": "PMQ", "paper": "AlphaQ as published", "auto": "ours"}
GAMMAS = (0, 1, 2, 5, 10, 20, 50, 200)
STEPS, QUICK_STEPS = 64, 8


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


def comparable(asked: Asked) -> Published:
    """What the paper gives for the model, as far as it is of what ours is of."""
    known, tasks = published_of(asked.run.name), asked.tasks
    if TEXT in asked.run.scoring.texts:
        known = replace(known, perplexity={})
    if tasks is None or set(tasks.names) != set(TASKS) or tasks.limit is not None or tasks.include_path is not None:
        known = replace(known, tasks={})
    return known


@dataclass(frozen=True)
class Results:
    """What came out. tables: rows by title; figures: names of their files; found: of whole models."""

    tables: dict[str, list[Row]]
    figures: Sequence[str]
    found: Sequence[Finding]


def write(asked: Asked, results: Results) -> str:
    """Write OUT/paper.md, which is returned, and OUT/paper.json."""
    run = asked.run
    told = render(asked, results) + "".join(f"\n![{name}]({name})\n" for name in results.figures)
    (run.out / "paper.md").write_text(told, encoding="utf-8")
    content = {
        "model": run.name,
        "machine": machine(),
        "versions": versions(),
        "published": asdict(comparable(asked)),
        "tables": {title: [vars(row) for row in rows] for title, rows in results.tables.items()},
        "models": [one.model_dump() for one in results.found],
    }
    (run.out / "paper.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return told


def render(asked: Asked, results: Results) -> str:
    """All tables as Markdown."""
    run = asked.run
    known = comparable(asked)
    header = ["method", "bits", "quantizer", "bytes", "perplexity", "in the paper", "KL", "top-1 %", "EAR"]

    def lines(rows: Sequence[Row]) -> Iterator[list[object]]:
        for row in rows:
            called = CALLED.get(row.method, row.method)
            if row.error:
                yield [called, f"{row.bits:g}", row.quantizer, row.error, *["–"] * 5]
                continue
            yield [
                called,
                f"{row.bits:g}",
                row.quantizer or "–",
                f"{row.size_bytes:,}",
                f"{row.mean_perplexity:.3f}",
                cell(known.perplexity, row.method, row.bits),
                f"{row.kl:.4f}",
                f"{100 * (row.top1 or 0):.1f}",
                f"{row.ear:.4f}",
            ]

    parts = [f"## {title}\n\n{markdown_table(header, lines(rows))}" for title, rows in results.tables.items()]
    about = (
        f"# The paper's experiments on {run.name}\n\nPerplexity and distances on "
        f"{', '.join(path.name for path in run.scoring.texts)}; the paper's on WikiText-2 with GPTQ. "
        "Every row of one width has the same budget for its weight files, scales included. Models were run "
        f"{'layer by layer from disk' if run.scoring.stream else 'in memory'}."
    )
    return "\n\n".join([about, *parts, *of_models(asked, results.found)]) + "\n"


def of_models(asked: Asked, found: Sequence[Finding]) -> Iterator[str]:
    """The tables of what whole models were asked; why, where there are none."""
    known, tasks = comparable(asked), asked.tasks
    yield "## Zero-shot tasks"
    if tasks is None:
        yield "Not run (`--tasks none`)."
    else:
        which = "all documents" if tasks.limit is None else f"{tasks.limit} documents of each"
        data = "" if tasks.include_path is None else f", questions from the folder {tasks.include_path.name}"
        yield (
            f"By lm-eval, {which}{data}, no examples in the prompt. Accuracy in per cent, normalised by length where "
            "lm-eval does that; the mean with its standard error. The paper speaks of six tasks without names or "
            f"metrics; they are taken to be {', '.join(TASKS)}. Its means stand here only beside those of all of them."
        )
        yield tasks_table(found, CALLED, known)
    yield "## Memory and decode speed"
    if asked.run.scoring.stream:
        yield "Not timed: the models do not fit into memory."
        return
    yield f"{asked.steps} tokens one by one, after {PROMPT}; × 16 bits: in turn with the original in its own type."
    yield speed_table(found, CALLED, known)


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


def tasks_of(given: argparse.Namespace) -> TaskRequest | None:
    """The tasks that were asked for; None for none. Raises AlphaQError for too few documents."""
    if given.tasks == "none":
        return None
    from alphaq.errors import AlphaQError
    from alphaq.evaluation.tasks import TaskRequest

    if given.limit is not None and given.limit < 2:
        raise AlphaQError(f"--limit {given.limit} leaves no standard error. Give at least 2 documents of each task.")

    folder = given.include_path.resolve() if given.include_path else None
    return TaskRequest.of(given.tasks, include_path=folder, limit=given.limit, few_shot=0, batch_size=8)


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
    arguments.add_argument("--tasks", default=",".join(TASKS), help="of lm-eval, comma-separated, or none")
    arguments.add_argument("--include-path", type=Path, help="folder of other task files, for example local_tasks.py's")
    arguments.add_argument("--limit", type=int, help="documents of each task; all by default")
    arguments.add_argument("--device", help="where models are run in memory: cpu, cuda")
    return arguments.parse_args()


def main() -> None:
    """Run what is missing, and write OUT/paper.md, OUT/paper.json and the figures."""
    from alphaq.errors import AlphaQError

    given = arguments_of()
    given.output.mkdir(parents=True, exist_ok=True)
    try:
        asked = Asked(experiment(given), tasks_of(given), QUICK_STEPS if given.quick else STEPS)
        run, _ = asked.run, asked.manager  # unknown tasks and missing data are refused before hours of other work
        tables = tables_of(run, GAMMAS[:3] if given.quick else GAMMAS)
        figures = draw(run, tables[METHODS_TITLE])
        write(asked, Results(tables, figures, ()))  # there if what follows fails
        found = findings(asked, tables[METHODS_TITLE])
    except AlphaQError as error:
        sys.exit(str(error))
    sys.stdout.write(write(asked, Results(tables, figures, found)))


if __name__ == "__main__":
    main()
