"""Let things go wrong at random moments of real runs, and see that nothing is lost and nothing damaged is published.

    python scripts/faults.py --times 40

Every fault is injected so many times into `analyze`, `plan` and `quantize` on a small model that is made for it. After
each, the output must be absent or complete; then the same command is repeated, and must end with the bytes of an
undisturbed run. Prints a Markdown table and writes it as JSON. Exits with 1 if anything was lost or corrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: runs are forks, which have none of their parent's threads
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

from injection import FAULTS, FAULTS_IN_PROCESSES, IN_PROCESSES, JOBS, Bench, Fault, Job, Outcome, inject  # noqa: E402
from runnable import save_runnable  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
SLOWER = 8  # a run in several processes takes so many times longer


def injections(fault: Fault, jobs: tuple[Job, ...], bench: Bench, times: int, seed: int) -> list[Outcome]:
    """Outcomes of one fault, its moments drawn from the seed; what is broken is told at once."""
    random = Random(f"{seed} {fault.name}")
    outcomes = []
    for number in range(times):
        job = jobs[number % len(jobs)]
        moment, chance = bench.moment(job, random), random.randrange(1 << 30)
        outcome = inject(fault, job, bench, moment, chance)
        if outcome.broken:
            print(f"BROKEN {fault.name}: {job.name} at {moment}, chance {chance}: {outcome.broken}", file=sys.stderr)
        outcomes.append(outcome)
    return outcomes


def row(name: str, outcomes: list[Outcome]) -> dict[str, str | int]:
    """A line of the table."""
    return {
        "fault": name,
        "injected": len(outcomes),
        "stopped_cleanly": sum(outcome.stopped and not outcome.broken for outcome in outcomes),
        "resumed_to_identical_bytes": sum(outcome.resumed for outcome in outcomes),
        "complete_all_the_same": sum(not outcome.resumed and not outcome.broken for outcome in outcomes),
        "lost_or_corrupted": sum(bool(outcome.broken) for outcome in outcomes),
    }


def table(rows: list[dict[str, str | int]]) -> str:
    """The rows in Markdown."""
    lines = ["| fault | times injected | outcome | lost or corrupted outputs |", "|---|--:|---|--:|"]
    for one in rows:
        outcome = (
            f"{one['stopped_cleanly']} stopped cleanly; {one['resumed_to_identical_bytes']} resumed to identical "
            f"bytes, {one['complete_all_the_same']} were complete and identical already"
        )
        lines.append(f"| {one['fault']} | {one['injected']} | {outcome} | {one['lost_or_corrupted']} |")
    return "\n".join(lines)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Inject faults into alphaq's runs and check what is left.")
    parser.add_argument("--times", type=int, default=20, help="how often each fault is injected")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the table goes as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(save_runnable(Path(scratch) / "original", "qwen3_moe"), Path(scratch) / "places")
        for job in (*JOBS, IN_PROCESSES):
            bench.learn(job)
        slow = max(1, arguments.times // SLOWER)
        wanted = [(fault, JOBS, arguments.times) for fault in FAULTS]
        wanted += [(fault, (IN_PROCESSES,), slow) for fault in FAULTS_IN_PROCESSES]
        for fault, jobs, times in wanted:
            if arguments.only not in fault.name:
                continue
            try:
                rows.append(row(fault.name, injections(fault, jobs, bench, times, arguments.seed)))
            except OSError as error:
                print(f"skipped: {fault.name} ({error})", file=sys.stderr)
    print(table(rows))
    found = {"seed": arguments.seed, "seconds": round(time.monotonic() - begin), "rows": rows}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(one["lost_or_corrupted"] for one in rows))


if __name__ == "__main__":
    sys.exit(main())
