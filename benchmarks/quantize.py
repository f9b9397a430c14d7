"""Quantizing one matrix: AlphaQ's step search against HQQ and plain min–max rounding.

Speed alone says little, so each row also has the relative error ‖W − Ŵ‖² ÷ ‖W‖², which is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from common import alternate, markdown_table, parser, save
from hqq.core.quantize import Quantizer

from alphaq.quantizers.packing import dequantize
from alphaq.quantizers.rtn import quantize_rtn
from alphaq.records import Choice

TITLE = "Quantizing"
GROUP_SIZE = 128
SHAPES = ((1408, 2048), (4096, 4096))
QUICK_SHAPES = ((128, 256),)
WEIGHTS = ("gaussian", "student-t")
BITS = (2, 3, 4)
ABOUT = f"""\
One float32 matrix, groups of {GROUP_SIZE}, all cores. HQQ is `hqq.core.quantize.Quantizer.quantize` with its optimizer
on, on the CPU; its packing is included. Min–max is the asymmetric rounding to nearest of a few lines of torch, not
packed. HQQ keeps scales and zero points as floats (32 bits a group when stored in halves), AlphaQ a half and a zero
point of the code's width (16 + b bits). HQQ minimises another norm than the squared error shown. Student-t weights
have 3 degrees of freedom."""


def weights(shape: tuple[int, int], kind: str) -> torch.Tensor:
    """Random weights of one kind, seeded by their shape."""
    random = np.random.default_rng(shape)
    values = random.standard_normal(shape) if kind == "gaussian" else random.standard_t(3, shape)
    return torch.from_numpy((0.02 * values).astype(np.float32))


def with_alphaq(weight: torch.Tensor, bits: int) -> Callable[[], torch.Tensor]:
    """Quantize with ours; returns what reads the result back."""
    quantized = quantize_rtn(weight, Choice(bits, GROUP_SIZE))
    return lambda: dequantize(quantized)


def with_hqq(weight: torch.Tensor, bits: int) -> Callable[[], torch.Tensor]:
    """Quantize with HQQ."""
    packed, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=GROUP_SIZE,
        optimize=True,
        axis=1,
        compute_dtype=torch.float32,
        device="cpu",
    )
    # `quantize` does not pass its compute_dtype on, and `dequantize` would unpack to float16.
    return lambda: Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32})


def with_min_max(weight: torch.Tensor, bits: int) -> Callable[[], torch.Tensor]:
    """Round to nearest over the full range of each group."""
    top = 2**bits - 1
    groups = weight.view(-1, GROUP_SIZE)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low) / top
    zero = (-low / scale).round_()
    codes = (groups / scale).round_().add_(zero).clamp_(0, top).to(torch.uint8)
    return lambda: ((codes - zero) * scale).view_as(weight)


CONTESTANTS = {"alphaq": with_alphaq, "hqq": with_hqq, "min_max": with_min_max}


def compare(shape: tuple[int, int], kind: str, bits: int, rounds: int) -> dict[str, Any]:
    """One row: all contestants on one matrix at one width."""
    weight = weights(shape, kind)
    timings, restored = alternate(
        {label: lambda work=work: work(weight, bits) for label, work in CONTESTANTS.items()}, rounds, limit_s=20
    )
    energy = weight.double().square().sum()
    return {
        "shape": list(shape),
        "weights": kind,
        "bits": bits,
        "group_size": GROUP_SIZE,
        "timings": {label: asdict(timing) for label, timing in timings.items()},
        "megaweights_per_s": {label: weight.numel() / timing.median_s / 1e6 for label, timing in timings.items()},
        "relative_error": {
            label: float((weight.double() - read()).square().sum() / energy) for label, read in restored.items()
        },
    }


def render(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown: speeds and ratios, then errors."""
    header = ["matrix", "bits", "AlphaQ Mw/s", "HQQ Mw/s", "min–max Mw/s", "HQQ ÷ AlphaQ", "min–max ÷ AlphaQ"]
    header += ["AlphaQ error", "HQQ error", "min–max error"]
    lines = [
        [
            f"{row['weights']} {' × '.join(map(str, row['shape']))}",
            row["bits"],
            *(f"{row['megaweights_per_s'][label]:,.1f}" for label in CONTESTANTS),
            *(f"{row['timings'][label]['ratio']:.3g}" for label in ("hqq", "min_max")),
            *(f"{row['relative_error'][label]:.5f}" for label in CONTESTANTS),
        ]
        for row in rows
    ]
    return f"{ABOUT}\n\nMw/s is millions of weights a second; ratios are of times.\n\n{markdown_table(header, lines)}"


def main() -> None:
    """Run, show and keep."""
    quick = parser(__doc__).parse_args().quick
    shapes, rounds = (QUICK_SHAPES, 2) if quick else (SHAPES, 5)
    rows = [compare(shape, kind, bits, rounds) for shape in shapes for kind in WEIGHTS for bits in BITS]
    save("quantize", TITLE, rows, render(rows), quick)


if __name__ == "__main__":
    main()
