"""The command line on synthetic checkpoints of real size: time, memory and traffic, and how they grow.

    python benchmarks/end_to_end.py [--layers 6 24] [--scratch DIR]

Every command is a process of its own, started with the checkpoint out of the page cache. Its whole
process tree is watched through Linux's /proc: memory every 50 ms; processor time and input/output once
at its end, when the kernel has added those of all children that were waited for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from common import HERE, SCRATCH, markdown_table, parser, save

TITLE = "End to end"
LAYERS = (6, 24)
QUICK_LAYERS = (1, 4)
PERIOD_S = 0.05
PSS_SHARE = 0.02
DEMO_MODEL = HERE.parent / "src" / "alphaq" / "data" / "tiny"
FIRST_BITS, SECOND_BITS = "2.5", "3.0"
ABOUT = """\
Synthetic bf16 checkpoints with the names and shapes of Qwen1.5-MoE-A2.7B (24 layers, 14.3 billion parameters) and of
its first layers. Each command is started with the checkpoint out of the page cache; `read once` is `cat` of the weight
files, the least that any tool needs. Each size begins with an empty cache; `plan again` uses what `plan` measured.
`plan by spectra alone` is `--method alphaq`; `plain groups` is `--fast`, without trellis codes.
`quantize` includes the re-reading of what it wrote against the source. CPU seconds are user and system time
of the process and its children. Private memory is what the system cannot drop (anonymous and shared pages); resident
memory also counts the pages of libraries, once for every process. Both are sums over the process tree, at their
peak. Read and written are bytes that came from or went to the disk."""


@dataclass(frozen=True)
class Usage:
    """What one command took, children included. Peaks are of sums over the process tree."""

    wall_s: float
    cpu_s: float
    peak_private_bytes: int
    peak_resident_bytes: int
    peak_proportional_bytes: int
    largest_process_bytes: int
    most_processes: int
    samples: int
    disk_read_bytes: int
    disk_written_bytes: int
    read_call_bytes: int
    write_call_bytes: int


class Watcher(threading.Thread):
    """Samples the memory of a process and its descendants until told to stop."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.private = self.resident = self.proportional = self.largest = self.most = self.samples = 0
        self._done = threading.Event()
        self._next_proportional = 0.0

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._done.wait(PERIOD_S):
            tree = _tree(self.process)
            found = [_fields(f"/proc/{process}/status") for process in tree]
            resident = [status.get("VmRSS", 0) for status in found]
            private = [status.get("RssAnon", 0) + status.get("RssShmem", 0) for status in found]
            self.resident = max(self.resident, 1024 * sum(resident))
            self.private = max(self.private, 1024 * sum(private))
            self.largest = max(self.largest, 1024 * max(resident, default=0))
            self.most = max(self.most, len(tree))
            self.samples += 1
            self._sample_proportional(tree)

    def _sample_proportional(self, tree: list[int]) -> None:
        """Walks page tables, which is slow for large maps: done so rarely that it takes 2 % of the time."""
        start = time.perf_counter()
        if start >= self._next_proportional:
            shares = [_fields(f"/proc/{process}/smaps_rollup").get("Pss", 0) for process in tree]
            self.proportional = max(self.proportional, 1024 * sum(shares))
            end = time.perf_counter()
            self._next_proportional = end + (end - start) / PSS_SHARE

    def stop(self) -> None:
        """End after the current sample."""
        self._done.set()
        self.join()


def _tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                after_name = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            children.setdefault(int(after_name[1]), []).append(int(folder.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def _fields(path: str) -> dict[str, int]:
    """Numbers of a /proc file of `name: number` lines; empty if the process is gone."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    parts = [line.replace(":", " ").split() for line in lines]
    return {part[0]: int(part[1]) for part in parts if len(part) > 1 and part[1].isdigit()}


def watched(command: list[str], environment: Mapping[str, str], output: Path) -> Usage:
    """Run a command with its standard output in a file. Exits with its error if it fails."""
    with output.open("wb") as out, TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors)
        watcher = Watcher(process.pid)
        watcher.start()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its counters can be read until it is reaped
        wall_s = time.perf_counter() - start
        watcher.stop()
        traffic = _fields(f"/proc/{process.pid}/io")
        _, status, times = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed: {errors.read().decode(errors='replace').strip()[-500:]}")
    return Usage(
        wall_s,
        times.ru_utime + times.ru_stime,
        watcher.private,
        watcher.resident,
        watcher.proportional,
        max(watcher.largest, 1024 * times.ru_maxrss),
        watcher.most,
        watcher.samples,
        *(traffic.get(name, 0) for name in ("read_bytes", "write_bytes", "rchar", "wchar")),
    )


def alphaq(*arguments: str | Path) -> list[str]:
    """The command line of the installed package."""
    return [sys.executable, "-m", "alphaq", *map(str, arguments)]


def evict(folder: Path) -> None:
    """Ask the kernel to forget a folder's files, so that the next command reads them from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only clean pages can go
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checkpoint(scratch: Path, layers: int, quick: bool) -> Path:
    """The synthetic checkpoint of that many layers, made if missing, by a process whose memory is not ours."""
    folder = scratch / f"{'toy' if quick else 'qwen1.5-moe'}-{layers}-layers"
    if not folder.exists():
        options = ["--quick"] if quick else []
        script = [sys.executable, str(HERE / "synthetic.py"), str(folder), "--layers", str(layers)]
        subprocess.run([*script, *options], check=True)
    return folder


def commands(source: Path, work: Path) -> Iterator[tuple[str, list[str]]]:
    """Labels and commands, in order."""
    yield "read once", ["cat", *map(str, sorted(source.glob("*.safetensors")))]
    by_spectra = ("--method", "alphaq", "--no-cache")
    yield (
        "plan by spectra alone",
        alphaq("plan", source, "--bits", FIRST_BITS, *by_spectra, "-o", work / "a.json", "--json"),
    )
    for label, bits in (("plan", FIRST_BITS), ("plan again", SECOND_BITS)):
        out = work / f"plan-{bits}.json"
        yield f"{label}, {bits} bits", alphaq("plan", source, "--bits", bits, "-o", out, "--json")
    fast = work / "fast.json"
    yield (
        "plan, plain groups",
        alphaq("plan", source, "--bits", FIRST_BITS, "--fast", "--no-cache", "-o", fast, "--json"),
    )
    for label, plan, out in (
        ("quantize, plain groups", fast, "fast"),
        ("quantize", work / f"plan-{FIRST_BITS}.json", "out"),
    ):
        yield label, alphaq("quantize", source, "--plan", plan, "-o", work / out, "--json")


def run_size(source: Path, scratch: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """All commands on one checkpoint, with an empty cache at the start; deletes what they wrote."""
    work = scratch / "work"
    for folder in (work, Path(environment["ALPHAQ_CACHE"])):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir()
    usages = {}
    for label, command in commands(source, work):
        evict(source)
        printed = Path(os.devnull) if label == "read once" else work / "printed.json"
        usages[label] = asdict(watched(command, environment, printed))
        sys.stderr.write(f"{source.name}: {label} took {usages[label]['wall_s']:.1f} s\n")
    result = json.loads((work / "printed.json").read_bytes())
    index = json.loads((source / "model.safetensors.index.json").read_bytes())
    row = {
        "model": source.name,
        "layers": json.loads((source / "config.json").read_bytes())["num_hidden_layers"],
        "parameters": index["metadata"]["total_size"] // 2,
        "source_bytes": _bytes(source),
        "output_bytes": _bytes(work / "out"),
        "verified": bool(result["against_source"]) and result["tensors"] == len(index["weight_map"]),
        "usages": usages,
    }
    shutil.rmtree(work)
    return row


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def warm_up(scratch: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Both stages on the bundled model: the first run on a machine compiles kernels, which is not to be timed."""
    out = scratch / "warm-up"
    shutil.rmtree(out, ignore_errors=True)
    command = alphaq("quantize", DEMO_MODEL, "--bits", FIRST_BITS, "-o", out, "--json")
    usage = watched(command, environment, scratch / "printed.json")
    shutil.rmtree(out)
    (scratch / "printed.json").unlink()
    return asdict(usage)


def render(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown: one table of what each command took, one of growth."""
    header = ["command", "layers", "seconds", "CPU seconds", "private MiB", "resident MiB", "read GB", "written GB"]
    taken = [
        [
            label,
            row["layers"],
            f"{usage['wall_s']:,.1f}",
            f"{usage['cpu_s']:,.1f}",
            f"{usage['peak_private_bytes'] / 2**20:,.0f}",
            f"{usage['peak_resident_bytes'] / 2**20:,.0f}",
            f"{usage['disk_read_bytes'] / 1e9:,.2f}",
            f"{usage['disk_written_bytes'] / 1e9:,.2f}",
        ]
        for label in rows[0]["usages"]
        for row in rows
        for usage in [row["usages"][label]]
    ]
    sizes = [
        [
            row["layers"],
            f"{row['parameters'] / 1e9:.2f}",
            f"{row['source_bytes'] / 1e9:.2f}",
            f"{row['output_bytes'] / 1e9:.2f}",
            "yes" if row["verified"] else "NO",
        ]
        for row in rows
    ]
    parts = [
        ABOUT,
        markdown_table(["layers", "parameters (10⁹)", "source GB", "quantized GB", "re-read and correct"], sizes),
        markdown_table(header, taken),
    ]
    if len(rows) > 1:
        parts += [_growth_text(rows[0], rows[-1]), markdown_table(["command", "time", "private memory"], _growth(rows))]
    return "\n\n".join(parts)


def _growth_text(small: dict[str, Any], large: dict[str, Any]) -> str:
    times = large["parameters"] / small["parameters"]
    return f"From {small['layers']} to {large['layers']} layers parameters grow {times:.2f} times. Then grow, in times:"


def _growth(rows: list[dict[str, Any]]) -> list[list[str]]:
    small, large = rows[0]["usages"], rows[-1]["usages"]

    def times(label: str, key: str) -> str:
        return f"{large[label][key] / small[label][key]:.2f}" if small[label][key] else "–"

    return [[label, times(label, "wall_s"), times(label, "peak_private_bytes")] for label in small]


def main() -> None:
    """Run, show and keep."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", help="sizes to run; 6 and all 24 by default")
    arguments.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for checkpoints, about 45 GB")
    given = arguments.parse_args()
    if sys.platform != "linux":
        sys.exit("This benchmark reads Linux's /proc. Run it on Linux.")
    scratch: Path = given.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ALPHAQ_CACHE": str(scratch / "cache")}
    layers = sorted(given.layers or (QUICK_LAYERS if given.quick else LAYERS))
    sources = [checkpoint(scratch, count, given.quick) for count in layers]
    first = warm_up(scratch, environment)
    rows = [run_size(source, scratch, environment) for source in sources]
    save("end_to_end", TITLE, {"warm_up": first, "sizes": rows}, render(rows), given.quick)


if __name__ == "__main__":
    main()
