"""CPU seconds that planning takes for llama.cpp, on layers of Qwen3-30B-A3B's shape.

python benchmarks/planning.py [--layers 2] [--more-layers 4] [--repeat OTHER]

What is counted is user and system time of `alphaq plan` in one process, nothing kept from earlier runs. The start
(imports, llama.cpp's tables) is the same for any model, so a second, deeper model tells what a layer adds. OTHER is the
`src` of another version of AlphaQ, which plans the same for comparison, of the first model alone.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from common import SCRATCH, markdown_table, parser, save
from synthetic import SHAPES, write_checkpoint

TITLE = "Planning for llama.cpp"
OWN = Path(__file__).parents[1] / "src"
BITS = 3.0
ABOUT = """\
Layers of Qwen3-30B-A3B's shape (128 experts of 768, 0.6 billion weights a layer) with heavy-tailed random weights. CPU
seconds, user and system, of `alphaq plan MODEL --engine llama.cpp` in one process, nothing kept from earlier runs; some
12 of them are imports and llama.cpp's tables, whatever the model. The method is the default one unless named.
*The other* is an earlier version, here the last that measured all errors in full (29 November 2026)."""
OF_BITS = "--bits", f"{BITS:g}"
PLANS = {
    "default": OF_BITS,
    "size": ("--size",),
    "fast": (*OF_BITS, "--fast"),
    "signal": (*OF_BITS, "--method", "signal"),
    "alphaq": (*OF_BITS, "--method", "alphaq"),
}
OF_BOTH = "default", "size"
"""What any version takes."""


@dataclass(frozen=True)
class Row:
    """One plan by one version. plan: its options."""

    layers: int
    plan: str
    version: str
    cpu_s: float


def cpu_seconds(source: Path, model: Path, options: tuple[str, ...]) -> float:
    """User and system time of one run of `alphaq plan` and what it starts."""
    command = [sys.executable, "-m", "alphaq", "plan", str(model), "--engine", "llama.cpp", *options]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    alone = ("--no-cache", "--quiet", "--workers", "1")  # what more workers cost depends on the machine
    subprocess.run([*command, *alone], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def model_of(layers: int, quick: bool, scratch: Path) -> Path:
    """A checkpoint of so many layers, made unless it is there."""
    folder = scratch / f"qwen3-{layers}{'-quick' if quick else ''}"
    if not folder.exists():
        write_checkpoint(folder, replace(SHAPES["qwen3"][quick], layers=layers))
    return folder


def options_of(name: str, model: Path) -> tuple[str, ...]:
    """The options of a plan; a size is that of so many bits for every weight."""
    options = PLANS[name]
    if options != ("--size",):
        return options
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors")) // 2
    return (*options, str(int(weights * (BITS + 0.5) / 8)))


def main() -> None:
    """A table of plans by versions."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--more-layers", type=int, help="of a second model")
    arguments.add_argument("--repeat", type=Path, metavar="OTHER", help="`src` of another version")
    arguments.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), help="some of the plans alone")
    arguments.add_argument("--scratch", type=Path, default=SCRATCH)
    given = arguments.parse_args()
    sources = {"this version": OWN} | ({} if given.repeat is None else {"the other": given.repeat})
    rows: list[Row] = []
    for layers in filter(None, (given.layers, given.more_layers)):
        model = model_of(layers, given.quick, given.scratch)
        for name, (version, source) in product(given.plans, sources.items()):
            if source != OWN and (layers != given.layers or name not in OF_BOTH):
                continue
            options = options_of(name, model)
            rows.append(Row(layers, " ".join(options), version, cpu_seconds(source, model, options)))
            cells = [(row.layers, row.plan, row.version, f"{row.cpu_s:.1f}") for row in rows]
            table = markdown_table(("layers", "plan", "version", "CPU seconds"), cells)
            markdown = f"{ABOUT}\n\n{table}"
            save("planning", TITLE, list(map(asdict, rows)), markdown, given.quick)  # at once: the other may take long


if __name__ == "__main__":
    main()
