"""What the benchmarks share: alternating timings, the machine in words, results as JSON and Markdown.

Contestants take turns within a round, so that a slow moment of the machine hits all of them alike, and
their ratio is the median over rounds of the quotient within a round. Light to import: no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCRATCH = HERE / "scratch"
PACKAGES = ("alphaq", "torch", "numpy", "numba", "scipy", "pulp", "hqq", "zstandard", "constriction")


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one contestant, and how many times the first one's they are."""

    median_s: float
    best_s: float
    rounds: int
    ratio: float

    def milliseconds(self) -> str:
        """Median, and best in brackets."""
        return f"{1e3 * self.median_s:,.1f} ({1e3 * self.best_s:,.1f})"


PAUSE_S = 0.1
TURN_S = 0.2


def alternate(
    contestants: Mapping[str, Callable[[], Any]], rounds: int = 7, limit_s: float = 60.0, warm_up: bool = True
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time contestants in turn, ours first; returns their timings and what each last returned.

    A turn is as many calls as fit into `TURN_S`, after a pause in which the threads of the one before it
    go to sleep (torch's keep a core busy while they wait for more). No round begins after `limit_s`, so
    that something slow is timed once. A warm-up call is not counted.
    """
    returned = {name: work() for name, work in contestants.items()} if warm_up else {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - began > limit_s:
            break
        for name, work in contestants.items():
            time.sleep(PAUSE_S)
            calls, start = 0, time.perf_counter()
            while not calls or time.perf_counter() - start < TURN_S:
                returned[name] = work()
                calls += 1
            seconds[name].append((time.perf_counter() - start) / calls)
    ours = next(iter(seconds.values()))
    timings = {
        name: Timing(
            statistics.median(taken),
            min(taken),
            len(taken),
            statistics.median(theirs / own for theirs, own in zip(taken, ours, strict=True)),
        )
        for name, taken in seconds.items()
    }
    return timings, returned


def machine() -> dict[str, Any]:
    """Hardware and system that the timings hold for."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python and the packages that take part, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help="toy sizes, to try the script; results go to scratch/")
    return made


def results_folder(quick: bool) -> Path:
    """Where results go: toy ones never replace real ones."""
    return SCRATCH / "quick" if quick else RESULTS


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its first column to the left and the numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def save(name: str, title: str, rows: Any, markdown: str, quick: bool) -> None:
    """Write results/NAME.json, raw rows and rendered tables, and show the tables."""
    result = {
        "benchmark": name,
        "title": title,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "markdown": markdown,
    }
    folder = results_folder(quick)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(f"{title}\n\n{markdown}\n")
