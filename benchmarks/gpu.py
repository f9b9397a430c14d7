"""A GPU checked and timed by one script: kernels against the CPU, decode, long prompts, spectra.

    python benchmarks/gpu.py [--out FILE] [--scratch DIR] [--quick]

First the tests of all Triton kernels run on the card: every format, decode and prefill, against the same product in
float64 on the CPU. Then decode and prefill are timed: a call is what a layer does after routing, gate, up, SiLU, down
for every (token, expert) pair. The baseline is one matrix product per chosen expert with gate and up as one matrix, the
best case of unpacked weights. Both run as CUDA graphs of many calls, which take turns over layers and routings, so
that nothing is still in the cache from the call before. Codes are random: time does not depend on them. At last the
spectra of a synthetic layer's experts: milliseconds per matrix on the card and on the CPU, and how far α differs.

Errors of rounding and the search of trellis codes have no path on a card.
"""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import HERE, SCRATCH, machine, markdown_table, parser, results_folder, versions
from torch.nn.functional import linear, silu

from alphaq.formats.blocks import native_format
from alphaq.formats.native import HEADER_BYTES
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.runtime.packed import PackedWeights

TITLE = "On a GPU"
TESTS = ("tests/runtime/test_triton_kernels.py",)
CHOICES = ("2", "t2", "3", "t3", "4", "t4", "8")
BATCHES = (1, 4, 8, 512)
DECODED = 8  # tokens up to which time goes into reading weights
SPECTRA = 60  # matrices
CALLS, REPLAYS = 16, 25
COLD_BYTES = 400e6  # several times any GPU's last cache
LARGEST_ERROR = 1e-2


@dataclass(frozen=True)
class Layer:
    """A sparse layer's experts."""

    name: str
    experts: int
    chosen: int
    hidden: int
    intermediate: int

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Of gate and up, and of down."""
        return (self.intermediate, self.hidden), (self.hidden, self.intermediate)


LAYERS = (Layer("Mixtral-8x7B", 8, 2, 4096, 14336), Layer("Qwen1.5-MoE-A2.7B", 60, 4, 2048, 1408))
QUICK_LAYERS = (Layer("toy", 8, 2, 512, 1024),)


@dataclass(frozen=True)
class Row:
    """One measurement; seconds of one call."""

    layer: str
    tokens: int
    choice: str
    packed_s: float
    bfloat16_s: float
    ratio: float
    packed_bytes: int
    bandwidth_share: float | None
    """None of long prompts. Bytes of the chosen experts' blocks per second, over those of a copy."""


def random_block(choice: Choice, shape: Shape) -> torch.Tensor:
    """A valid block with random codes and zero points, on the GPU."""
    form = native_format(choice)
    codes, offsets, scales, _ = form.parts(choice, shape)
    flags = int(choice.symmetric) | form.kind_number(choice) << 1
    header = struct.pack("<2sBBHHII", b"AQ", 1, choice.bits, choice.group_size, flags, *shape)
    block = torch.randint(256, (storage_bytes(choice, shape),), dtype=torch.uint8, device="cuda")
    block[:HEADER_BYTES] = torch.tensor(list(header), dtype=torch.uint8)
    start = HEADER_BYTES + codes + offsets
    values = (torch.rand(scales // 2, device="cuda") * 0.01 + 0.005).half()
    block[start : start + scales] = values.view(torch.uint8)
    block[start + scales :] = 0
    return block


def packed_layer(layer: Layer, choice: Choice) -> tuple[PackedWeights, PackedWeights]:
    """Gate and up, and down."""
    made = []
    for projections, shape in zip((2, 1), layer.shapes, strict=True):
        weights = PackedWeights([[f"{p}.{e}" for e in range(layer.experts)] for p in range(projections)], shape)
        weights.fill([[random_block(choice, shape) for _ in range(layer.experts)] for _ in range(projections)])
        made.append(weights)
    return made[0], made[1]


def routings(layer: Layer, tokens: int, seed: int) -> list[torch.Tensor]:
    """Experts of each call, [tokens, chosen]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(tokens, layer.experts, generator=generator).topk(layer.chosen).indices for _ in range(CALLS)]


def time_s(call: Callable[[int], object]) -> float:
    """Seconds of one call: median over replays of a graph of `CALLS`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile before capture
        for number in range(CALLS):
            call(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(number)
    for _ in range(3):
        graph.replay()
    taken = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(taken)


def copy_bytes_per_s() -> float:
    """Bytes read and written by a large copy within the device, per second."""
    source = torch.randint(256, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_s(lambda _: target.copy_(source))


def time_packed(layer: Layer, layers: list[tuple[PackedWeights, PackedWeights]], tokens: int) -> tuple[float, float]:
    """Seconds of a call, and mean bytes of the blocks that a call reads."""
    from alphaq.runtime.triton_kernels import packed_linear

    inputs = torch.randn(tokens, layer.hidden, dtype=torch.bfloat16, device="cuda")
    chosen = routings(layer, tokens, seed=tokens)
    experts = [routing.flatten().cuda() for routing in chosen]
    token = torch.arange(tokens, device="cuda").repeat_interleave(layer.chosen)
    pair = torch.arange(tokens * layer.chosen, device="cuda")

    def call(number: int) -> torch.Tensor:
        both, down = layers[number % len(layers)]
        gate, up = packed_linear(inputs, both.table, layer.intermediate, experts[number], token).chunk(2, dim=1)
        return packed_linear(silu(gate) * up, down.table, layer.hidden, experts[number], pair)

    distinct = sum(len(routing.unique()) for routing in chosen) / CALLS
    return time_s(call), distinct * sum(weights.nbytes for weights in layers[0]) / layer.experts


def time_bfloat16(layer: Layer, both: torch.Tensor, down: torch.Tensor, tokens: int) -> float:
    """Seconds of a call; weights are [experts, rows, columns]."""
    inputs = torch.randn(tokens, layer.hidden, dtype=torch.bfloat16, device="cuda")
    plans = [
        [(expert, (routing == expert).any(1).nonzero()[:, 0].cuda()) for expert in routing.unique().tolist()]
        for routing in routings(layer, tokens, seed=tokens)
    ]

    def call(number: int) -> list[torch.Tensor]:
        out = []
        for expert, mine in plans[number]:
            rows = inputs if tokens == 1 else inputs[mine]
            gate, up = linear(rows, both[expert]).chunk(2, dim=1)
            out.append(linear(silu(gate) * up, down[expert]))
        return out

    return time_s(call)


def check(layer: Layer, weights: PackedWeights, choice: Choice) -> None:
    """Exit unless the kernels multiply with a block's values."""
    from alphaq.runtime.triton_kernels import packed_linear

    rows, columns = weights.shape
    inputs = torch.randn(1, columns, dtype=torch.bfloat16, device="cuda")
    last = torch.tensor([layer.experts - 1], device="cuda")
    found = packed_linear(inputs, weights.table, rows, last, torch.zeros_like(last))[0, -rows:]
    restored = weights.dequantized(len(weights.names) - 1, layer.experts - 1, torch.float32)
    expected = restored.double() @ inputs[0].double()
    error = ((found.double() - expected).norm() / expected.norm()).item()
    if not error < LARGEST_ERROR:
        sys.exit(f"{layer.name} as {choice}: the kernels are wrong, relative error {error:.3g}.")


def measure(layers: tuple[Layer, ...], copy_rate: float) -> list[Row]:
    """All rows, the baseline once per layer and batch."""
    rows = []
    for layer in layers:
        (intermediate, hidden), _ = layer.shapes
        both = torch.randn(layer.experts, 2 * intermediate, hidden, dtype=torch.bfloat16, device="cuda")
        down = torch.randn(layer.experts, hidden, intermediate, dtype=torch.bfloat16, device="cuda")
        baseline = {tokens: time_bfloat16(layer, both, down, tokens) for tokens in BATCHES}
        del both, down
        for choice in map(parse_choice, CHOICES):
            first = packed_layer(layer, choice)
            for weights in first:
                check(layer, weights, choice)
            copies = int(COLD_BYTES // sum(weights.nbytes for weights in first))
            several = [first, *(packed_layer(layer, choice) for _ in range(copies))]
            for tokens in BATCHES:
                seconds, size = time_packed(layer, several, tokens)
                share = size / seconds / copy_rate if tokens <= DECODED else None
                ratio = baseline[tokens] / seconds
                rows.append(Row(layer.name, tokens, str(choice), seconds, baseline[tokens], ratio, round(size), share))
    return rows


def checked() -> str:
    """The closing line of the kernels' tests on this card. Exits where they fail, or did not run on it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    ran = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"The kernels do not pass their tests on this card:\n{ran.stdout[-4000:]}")
    return ran.stdout.strip().splitlines()[-1]


def spectra(scratch: Path, quick: bool, device: str) -> dict[str, Any]:
    """Milliseconds per matrix on the card and on the CPU, and the largest difference of α."""
    from end_to_end import checkpoint as synthetic

    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.spectra.device import device_spectra
    from alphaq.spectra.measure import spectrum

    model = open_checkpoint(synthetic(scratch, 1, quick))
    matrices = [matrix for matrix in model.planned if matrix.layer == 0][:SPECTRA]
    taken, alphas = {}, {}
    for name, measured in {
        "warm-up": lambda: device_spectra(model, matrices[:2], device),
        device: lambda: device_spectra(model, matrices, device),
        "cpu": lambda: (spectrum(model.read(matrix), matrix.name) for matrix in matrices),
    }.items():
        begin = time.perf_counter()
        alphas[name] = [found.alpha for found in measured()]
        taken[name] = 1e3 * (time.perf_counter() - begin) / len(alphas[name])
    both = zip(alphas[device], alphas["cpu"], strict=True)
    return {
        "matrices": len(matrices),
        "shape": list(matrices[0].shape),
        "device_ms": taken[device],
        "cpu_ms": taken["cpu"],
        "largest_difference": max(abs(there - here) for there, here in both if there is not None and here is not None),
    }


def table(rows: list[Row]) -> str:
    """As Markdown."""
    header = ["layer", "tokens", "choice", "packed µs", "bfloat16 µs", "times faster", "share of copy bandwidth"]
    return markdown_table(
        header,
        [
            (
                row.layer,
                row.tokens,
                row.choice,
                f"{1e6 * row.packed_s:.1f}",
                f"{1e6 * row.bfloat16_s:.1f}",
                f"{row.ratio:.2f}",
                "" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f} %",
            )
            for row in rows
        ],
    )


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__)
    arguments.add_argument("--out", type=Path, help="JSON file to write; results/gpu.json by default")
    arguments.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for a layer of 2.4 GB")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        arguments.error("there is no CUDA device here. Run it on a machine with an NVIDIA GPU.")
    import triton

    tests = checked()
    torch.manual_seed(0)
    alpha = spectra(given.scratch, given.quick, "cuda")
    with torch.inference_mode():
        copy_rate = copy_bytes_per_s()
        rows = measure(QUICK_LAYERS if given.quick else LAYERS, copy_rate)
    markdown = table(rows)
    result = {
        "benchmark": "gpu",
        "title": TITLE,
        "date": date.today().isoformat(),
        "machine": {**machine(), "gpu": torch.cuda.get_device_name(), "copy_bytes_per_s": copy_rate},
        "versions": {**versions(), "triton": triton.__version__, "cuda": torch.version.cuda},
        "tests": tests,
        "spectra": alpha,
        "rows": [asdict(row) for row in rows],
        "markdown": markdown,
    }
    path = given.out or results_folder(given.quick) / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    found = (
        f"{TITLE}: a copy moves {copy_rate / 1e12:.2f} TB/s",
        f"Kernels: {tests}",
        f"Spectra of {alpha['matrices']} matrices: {alpha['device_ms']:.1f} ms each, {alpha['cpu_ms']:.1f} on the CPU; "
        f"α differs by {alpha['largest_difference']:.1e}",
        markdown,
    )
    sys.stdout.write("\n\n".join(found) + "\n")


if __name__ == "__main__":
    main()
