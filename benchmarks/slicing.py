"""Slicing beside copying: a nested 4-bit artifact cut down to 3 bits, and the same files read and written.

    python benchmarks/slicing.py [--layers 8] [--scratch DIR]

8 layers of a Mixtral's shape are 2.4 GB in bf16 and 0.6 GB at 4 bits.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import SCRATCH, markdown_table, parser, save
from end_to_end import evict
from gptq import DIMENSIONS, QUICK
from synthetic import write_checkpoint

TITLE = "Slicing"
LAYERS, BITS, ROUNDS = 8, 3.0, 3
ABOUT = """\
A checkpoint of a Mixtral's shape (8 experts of 2,816, hidden size 2,048, random weights), quantized to `4g128-nest`,
is cut down to 3 bits as `alphaq slice --method alphaq` does: planned from α of its plan and from errors that are added
up from codes, written, and re-read against the artifact. `write` is without the re-reading. Beside it the same files
are read and written in chunks, and synchronised to the disk, as slices are. Megabytes are those of the artifact; the
files are not in the system's cache at first."""


def timed(work: Callable[[], Any], before: Callable[[], None]) -> float:
    """Least wall time of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        before()
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


def copy(source: Path, target: Path) -> None:
    """Files read and written in chunks, then on the disk for good."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as given, (target / path.name).open("wb") as taken:
            shutil.copyfileobj(given, taken, 1 << 24)
            taken.flush()
            os.fsync(taken.fileno())


def run(layers: int, processes: int | None, quick: bool, scratch: Path) -> dict[str, Any]:
    """One artifact, planned for, cut, and copied."""
    from alphaq import pipeline
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.settings import Budget, PlanConfig, Rule
    from alphaq.planning import PlanInputs, make_plan, measure_for_plan, resolve
    from alphaq.work.workers import Workers, sensible_count
    from alphaq.writing.artifact import known_alphas, nested_choices, open_artifact, own_pins

    source, artifact, out = scratch / "slicing-source", scratch / "slicing-artifact", scratch / "slicing-out"
    for folder in (source, artifact, out):
        shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(source, replace(QUICK if quick else DIMENSIONS, layers=layers))
    opened = open_checkpoint(source)
    with Workers(sensible_count(opened.nbytes), opened) as workers:
        request = resolve(PlanConfig(budget=Budget(bits=4), choices="4g128-nest", method="alphaq"))
        plan = make_plan(opened, request, measure_for_plan(opened, request, resources=Resources(workers)))
        pipeline.quantize(opened, plan, artifact, resources=Resources(workers))
    shutil.rmtree(source)
    checkpoint, held = open_artifact(artifact)
    pins = tuple(Rule.parse(pin, "--pin") for pin in own_pins(checkpoint, held))
    choices = nested_choices(checkpoint, held)
    request = resolve(PlanConfig(budget=Budget(bits=BITS), choices=choices, method="alphaq", pins=pins))

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        evict(artifact)

    processes = processes or sensible_count(checkpoint.nbytes)
    with Workers(processes, checkpoint) as workers:
        known = known_alphas(checkpoint, held, request.config)

        def planned() -> Any:
            return make_plan(
                checkpoint, request, measure_for_plan(checkpoint, request, PlanInputs(known), Resources(workers))
            )

        plan = planned()
        seconds = {
            "plan": timed(planned, fresh),
            "write": timed(
                lambda: pipeline.quantize(
                    checkpoint, plan, out, pipeline.WriteOptions(check=False), pipeline.Resources(workers)
                ),
                fresh,
            ),
            "write and re-read": timed(
                lambda: pipeline.quantize(checkpoint, plan, out, resources=pipeline.Resources(workers)), fresh
            ),
        }
    sliced = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    seconds["copy"] = timed(lambda: copy(artifact, out), fresh)
    row = {
        "layers": layers,
        "processes": processes,
        "source_bytes": checkpoint.nbytes,
        "size_bytes": sliced,
        "seconds": seconds,
    }
    for folder in (artifact, out):
        shutil.rmtree(folder)
    return row


def render(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    header = ["layers", "processes", "artifact MB", "slice MB", "stage", "seconds", "MB/s", "of copying"]
    table = [
        [
            row["layers"],
            row["processes"],
            f"{row['source_bytes'] / 1e6:,.0f}",
            f"{row['size_bytes'] / 1e6:,.0f}",
            stage,
            f"{seconds:.2f}",
            f"{row['source_bytes'] / 1e6 / seconds:,.0f}",
            f"{row['seconds']['copy'] / seconds:.2f} ×",
        ]
        for row in rows
        for stage, seconds in row["seconds"].items()
    ]
    return f"{ABOUT}\n\n{markdown_table(header, table)}"


def main() -> None:
    """Run, show and keep."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=LAYERS)
    arguments.add_argument("--workers", type=int, nargs="+", help="processes; as many as slice takes by default")
    arguments.add_argument("--scratch", type=Path, default=SCRATCH)
    given = arguments.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    rows = [
        run(2 if given.quick else given.layers, processes, given.quick, given.scratch.resolve())
        for processes in given.workers or [None]
    ]
    save("slicing", TITLE, rows, render(rows), given.quick)


if __name__ == "__main__":
    main()
