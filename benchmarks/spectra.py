"""Tail exponent α of one matrix: AlphaQ against an SVD per block and against batched eigenvalues in torch.

All three see the same sampled blocks and end with the same Hill estimate. The loop is how the method's
reference code does it; the batch is the best that stock torch offers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from common import alternate, markdown_table, parser, save

from alphaq.spectra.eigenvalues import largest_eigenvalues
from alphaq.spectra.farms import blocks
from alphaq.spectra.measure import spectrum
from alphaq.spectra.tail import hill_exponent, tail_exponent

TITLE = "Measuring α"
SHAPES = ((1408, 2048), (14336, 4096), (768, 2048))
QUICK_SHAPES = ((256, 384),)
ABOUT = """\
One matrix, at most 256 blocks of 128 × 128, all cores. The loop calls `torch.linalg.svdvals` on each block, as the
reference code does; the batch, which is also what `--device cuda` uses, calls `torch.linalg.eigvalsh` once on all Gram
matrices. With the variance of all weights, which a cost table needs too, or without. Milliseconds, median (best); a
ratio is how many times longer the other one takes. Δα is the largest difference between any two of the three."""


def heavy_tailed(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Gaussian weights times Pareto factors of rows and columns, like a trained layer's outliers."""
    random = np.random.default_rng(shape)
    down, across = (1 + random.pareto(3.0, side).astype(np.float32) for side in shape)
    weight = random.standard_normal(shape, dtype=np.float32)
    weight *= 0.02 * down[:, None]
    weight *= across
    return torch.from_numpy(weight).to(dtype)


def loop_alpha(weight: torch.Tensor, name: str) -> float:
    """One SVD call per block."""
    squares = [torch.linalg.svdvals(block).square() for block in blocks(weight, name).float()]
    return hill_exponent(torch.cat(squares).sort().values)


def batched_alpha(weight: torch.Tensor, name: str) -> float:
    """One eigenvalue call for all blocks."""
    cut = blocks(weight, name).float()
    eigenvalues = torch.linalg.eigvalsh(cut @ cut.transpose(1, 2))
    return hill_exponent(eigenvalues.clamp_min_(0).flatten().sort().values)


def alphaq_alpha(weight: torch.Tensor, name: str) -> float:
    """Ours, given the mean square that scales the weights."""
    return tail_exponent(*largest_eigenvalues(weight, name, 1e-3))


def with_variance(alpha: Callable[[torch.Tensor, str], float]) -> Callable[[torch.Tensor, str], float]:
    """The same, and torch's variance of all weights."""

    def both(weight: torch.Tensor, name: str) -> float:
        weight.var()
        return alpha(weight, name)

    return both


def alphaq_spectrum(weight: torch.Tensor, name: str) -> float | None:
    """Ours: everything a cost table needs."""
    return spectrum(weight, name).alpha


def compare(
    device: str, weight: torch.Tensor, contestants: dict[str, Callable[[torch.Tensor, str], Any]], rounds: int
) -> dict[str, Any]:
    """One row: the contestants on one matrix."""
    timings, alphas = alternate(
        {label: lambda work=work: work(weight, "matrix") for label, work in contestants.items()}, rounds
    )
    known = [alpha for alpha in alphas.values() if alpha is not None]
    return {
        "device": device,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "blocks": len(blocks(weight, "matrix")),
        "timings": {label: asdict(timing) for label, timing in timings.items()},
        "milliseconds": {label: timing.milliseconds() for label, timing in timings.items()},
        "alpha": alphas,
        "alpha_difference": max(known) - min(known),
    }


def cpu_rows(shapes: tuple[tuple[int, int], ...], rounds: int) -> list[dict[str, Any]]:
    """Every shape from float32 and from bfloat16 weights."""
    kinds: dict[str, dict[str, Callable[[torch.Tensor, str], Any]]] = {
        "α": {"alphaq": alphaq_alpha, "batch": batched_alpha, "loop": loop_alpha},
        "α, variance": {
            "alphaq": alphaq_spectrum,
            "batch": with_variance(batched_alpha),
            "loop": with_variance(loop_alpha),
        },
    }
    return [
        compare("cpu", heavy_tailed(shape, dtype), contestants, rounds) | {"finds": finds}
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for finds, contestants in kinds.items()
    ]


def gpu_rows(shapes: tuple[tuple[int, int], ...], rounds: int) -> list[dict[str, Any]]:
    """What torch does on a GPU, weights there already; `hill_exponent` waits for the result. None without CUDA."""
    if not torch.cuda.is_available():
        return []
    contestants: dict[str, Callable[[torch.Tensor, str], Any]] = {"batch": batched_alpha}
    return [
        compare(torch.cuda.get_device_name(), heavy_tailed(shape, torch.bfloat16).cuda(), contestants, rounds)
        | {"finds": "α"}
        for shape in shapes
    ]


def render(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    header = [
        "matrix",
        "stored as",
        "device",
        "finds",
        "AlphaQ",
        "batch",
        "loop",
        "batch ÷ AlphaQ",
        "loop ÷ AlphaQ",
        "α",
        "Δα",
    ]
    lines = []
    for row in rows:
        shown, timings = row["milliseconds"], row["timings"]
        ratios = [
            f"{timings[peer]['ratio']:.1f}" if {peer, "alphaq"} <= timings.keys() else "–" for peer in ("batch", "loop")
        ]
        lines.append(
            [
                " × ".join(map(str, row["shape"])),
                row["dtype"],
                row["device"],
                row["finds"],
                *(shown.get(label, "–") for label in ("alphaq", "batch", "loop")),
                *ratios,
                f"{next(iter(row['alpha'].values())):.4f}",
                f"{row['alpha_difference']:.1g}",
            ]
        )
    return f"{ABOUT}\n\n{markdown_table(header, lines)}"


def main() -> None:
    """Run, show and keep."""
    quick = parser(__doc__).parse_args().quick
    shapes, rounds = (QUICK_SHAPES, 2) if quick else (SHAPES, 9)
    rows = cpu_rows(shapes, rounds) + gpu_rows(shapes, rounds)
    save("spectra", TITLE, rows, render(rows), quick)


if __name__ == "__main__":
    main()
