"""Plans of a share of a model's bytes beside plans of all bytes.

    python benchmarks/price.py MODEL [MODEL ...] [--share 0.01] [--engine native ...] [--store] [--auto]

For sizes that plain bits of 2, 2.5, 3 and 4 take, the plan that `--share` makes is valued by the errors of whole
matrices, and set beside the plan that is best by those. --store: the model is put on an S3-compatible server of this
machine first (in memory, so for small models), and the bytes that it serves are counted. --auto: both are also set
beside the default method's plan, in its nats, which takes a pass through all weights.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import HERE, markdown_table, parser, save

TITLE = "Plans of a share of the bytes"
BITS = (2.0, 2.5, 3.0, 4.0)


def main() -> None:
    """Measure, print, and keep the result."""
    options = parser(__doc__)
    options.add_argument("models", nargs="+", type=Path)
    options.add_argument("--share", type=float, default=0.01)
    options.add_argument("--engine", action="append", help="native by default; repeat")
    options.add_argument("--store", action="store_true")
    options.add_argument("--auto", action="store_true")
    arguments = options.parse_args()
    reads = served(arguments.models, arguments.share) if arguments.store else [{}] * len(arguments.models)
    rows = []
    for model, read in zip(arguments.models, reads, strict=True):
        for engine in arguments.engine or ["native"]:
            for one in compared(model, engine, arguments.share, arguments.auto):
                sys.stderr.write(f"{one}\n")
                rows.append({**one, **told(model, arguments.share), **read})
    save("price", TITLE, rows, markdown_table(list(rows[0]), [list(row.values()) for row in rows]), arguments.quick)


def told(model: Path, share: float) -> dict[str, Any]:
    """Bytes of rows, and of routers and norms, that are read."""
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.measuring.rows import draw_rows

    extent = draw_rows(open_checkpoint(model), share).extent
    return {"rows": extent.rows, "share": f"{100 * extent.rows / extent.matrices:.3g} %", "whole": extent.whole}


def served(models: Sequence[Path], share: float) -> list[dict[str, Any]]:
    """What a server gives a first run that it does not give a second one, and what it gives that."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import objectstore

    server = objectstore.start()  # one for all, as s3fs keeps the first one's address
    os.environ.update(server.environment(), ALPHAQ_CACHE=tempfile.mkdtemp())
    counts = []
    for model in models:
        url, runs = server.upload(model, "models", model.name), []
        for _ in range(2):
            server.counter.reset()
            _run("price", url, "--share", f"{100 * share}%", "--choices", "2,4", "--workers", "1", "--quiet")
            runs.append(server.counter.served)
        counts.append({"served once": runs[0] - runs[1], "served again": runs[1]})
    server.stop()
    return counts


def _run(*words: str) -> None:
    from alphaq.cli.app import main as run

    try:
        run(list(words))
    except SystemExit as stop:
        if stop.code:
            raise


def compared(model: Path, engine: str, share: float, auto: bool) -> Iterator[dict[str, Any]]:
    """A row for each size."""
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.nouns.plan import Plan
    from alphaq.nouns.settings import Budget, PlanConfig
    from alphaq.planning import make_plan, measure_for_plan, plain_size, resolve
    from alphaq.planning.pricing import sampling_error

    checkpoint = open_checkpoint(model)
    ways = {"few": {"method": "typical", "share": share}, "all": {"method": "typical"}, "auto": {"method": "auto"}}
    measured, seconds = {}, {}
    for way, settings in ways.items():
        if way == "auto" and not auto:
            continue
        begin = time.process_time()
        request = resolve(PlanConfig(engine=engine, budget=Budget(size_bytes=2**50), **settings))
        measured[way] = measure_for_plan(checkpoint, request, settle=False)
        seconds[way] = time.process_time() - begin
    for bits in BITS:
        size = plain_size(checkpoint, resolve(PlanConfig(engine=engine, budget=Budget(bits=bits))), bits)
        plans: dict[str, Plan] = {
            way: make_plan(
                checkpoint, resolve(PlanConfig(engine=engine, budget=Budget(size_bytes=size), **ways[way])), one
            )
            for way, one in measured.items()
        }
        row = {
            "model": model.name,
            "engine": engine,
            "bits": bits,
            "size": size,
            "loss, few / all": round(valued(plans["few"], plans["all"]), 4),
            "foretold / true": round((plans["few"].objective or 0.0) / valued(plans["few"], plans["all"], False), 3),
            "± by sampling": round(sampling_error(plans["few"], measured["few"]), 4),
        }
        if auto:
            row["nats, few / auto"] = round(valued(plans["few"], plans["auto"]), 3)
            row["nats, all / auto"] = round(valued(plans["all"], plans["auto"]), 3)
        yield {**row, "CPU s, few": round(seconds["few"], 1), "CPU s, all": round(seconds["all"], 1)}


def valued(plan: Any, by: Any, relative: bool = True) -> float:
    """A plan's loss by another's table, over that plan's own."""
    table = by.table
    column = {name: number for number, name in enumerate(table.choices)}

    def loss(one: Any) -> float:
        return sum(
            losses[column[one.choices[(table.members.get(unit) or (unit,))[0]]]] or 0.0
            for unit, losses in table.losses.items()
        )

    return loss(plan) / loss(by) if relative else loss(plan)


if __name__ == "__main__":
    main()
