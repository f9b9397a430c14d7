"""Quantizing one matrix: AlphaQ's step search and its half-quadratic splitting against HQQ and plain min–max rounding.

Speed alone says little, so each row also has the relative error ‖W − Ŵ‖² ÷ ‖W‖² and Σ|w − ŵ|^0.7, which HQQ minimises;
they are not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, markdown_table, parser, save
from hqq.core.quantize import Quantizer
from safetensors import safe_open

import alphaq
from alphaq.formats.blocks import dequantize
from alphaq.nouns.choice import Choice
from alphaq.quantizers.debiased import quantize_mse
from alphaq.quantizers.hqq import NORM, lp_objective, quantize_hqq

TITLE = "Quantizing"
GROUP_SIZE = 128
SHAPES = ((1408, 2048), (4096, 4096))
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"  # of the bundled model
QUICK_SHAPES = ((128, 256),)
WEIGHTS = ("gaussian", "student-t")
BITS = (2, 3, 4, 8)
NORM_GROUP_SIZES = (64, 128)
ABOUT = f"""\
One float32 matrix, groups of {GROUP_SIZE}, all cores. AlphaQ is `quantize_mse` (`--quantizer mse`),
which minimises the error shown (the default's last fit takes a tenth more time at 2 to 8 bits, as much again at 1).
AlphaQ HQQ is `quantize_hqq`. HQQ is `hqq.core.quantize.Quantizer.quantize` with its optimizer on, on the CPU; its
packing is included. Min–max is the asymmetric rounding to nearest of a few lines of torch, not packed. HQQ keeps scales
and zero points as floats (32 bits a group when stored in halves), AlphaQ a half and a zero point of the code's width
(16 + b bits). Student-t weights have 3 degrees of freedom."""
ABOUT_NORM = f"""\
Σ|w − ŵ|^{NORM}, which HQQ minimises: that of AlphaQ HQQ ÷ that of HQQ. Matrices as in the first rows above; the expert,
256 × 256, is one of the bundled model."""


def weights(shape: tuple[int, int], kind: str) -> torch.Tensor:
    """Random weights of one kind, seeded by their shape."""
    random = np.random.default_rng(shape)
    values = random.standard_normal(shape) if kind == "gaussian" else random.standard_t(3, shape)
    return torch.from_numpy((0.02 * values).astype(np.float32))


def with_alphaq(weight: torch.Tensor, bits: int) -> Callable[[], torch.Tensor]:
    """Quantize with ours; returns what reads the result back."""
    quantized = quantize_mse(weight, Choice(bits, GROUP_SIZE))
    return lambda: dequantize(quantized)


def with_alphaq_hqq(weight: torch.Tensor, bits: int, group_size: int = GROUP_SIZE) -> Callable[[], torch.Tensor]:
    """Quantize with our half-quadratic splitting."""
    quantized = quantize_hqq(weight, Choice(bits, group_size))
    return lambda: dequantize(quantized)


def with_hqq(weight: torch.Tensor, bits: int, group_size: int = GROUP_SIZE) -> Callable[[], torch.Tensor]:
    """Quantize with HQQ."""
    packed, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=group_size,
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


CONTESTANTS = {"alphaq": with_alphaq, "alphaq_hqq": with_alphaq_hqq, "hqq": with_hqq, "min_max": with_min_max}
TITLES = {"alphaq": "AlphaQ", "alphaq_hqq": "AlphaQ HQQ", "hqq": "HQQ", "min_max": "min–max"}


def compare(shape: tuple[int, int], kind: str, bits: int, rounds: int) -> dict[str, Any]:
    """One row: all contestants on one matrix at one width."""
    weight = weights(shape, kind)
    timings, restored = alternate(
        {label: lambda work=work: work(weight, bits) for label, work in CONTESTANTS.items()}, rounds, limit_s=20
    )
    energy = weight.double().square().sum()
    values = {label: read() for label, read in restored.items()}
    return {
        "shape": list(shape),
        "weights": kind,
        "bits": bits,
        "group_size": GROUP_SIZE,
        "timings": {label: asdict(timing) for label, timing in timings.items()},
        "megaweights_per_s": {label: weight.numel() / timing.median_s / 1e6 for label, timing in timings.items()},
        "relative_error": {
            label: float((weight.double() - found).square().sum() / energy) for label, found in values.items()
        },
        "objective": {label: lp_objective(weight, found) for label, found in values.items()},
    }


def compare_norms(weight: torch.Tensor, kind: str, bits: int) -> dict[str, Any]:
    """One row: the objectives of both half-quadratic quantizers on one matrix, by group size."""
    found = {
        group_size: [lp_objective(weight, work(weight, bits, group_size)()) for work in (with_alphaq_hqq, with_hqq)]
        for group_size in NORM_GROUP_SIZES
    }
    return {"weights": kind, "bits": bits, "objectives": found}


def expert() -> torch.Tensor:
    """A trained matrix, float32 [256, 256]."""
    with safe_open(Path(alphaq.__file__).parent / "data" / "tiny" / "model.safetensors", "pt") as file:
        return file.get_tensor(EXPERT).float()


def render(rows: list[dict[str, Any]], norms: list[dict[str, Any]]) -> str:
    """Rows as Markdown: speeds and ratios, then errors; then the objectives of half-quadratic quantizers."""
    header = ["matrix", "bits", *(f"{title} Mw/s" for title in TITLES.values())]
    header += ["HQQ ÷ AlphaQ", "HQQ ÷ AlphaQ HQQ", *(f"{title} error" for title in TITLES.values())]
    lines = [
        [
            f"{row['weights']} {' × '.join(map(str, row['shape']))}",
            row["bits"],
            *(f"{row['megaweights_per_s'][label]:,.1f}" for label in CONTESTANTS),
            *(
                f"{row['timings']['hqq']['ratio'] / row['timings'][ours]['ratio']:.3g}"
                for ours in ("alphaq", "alphaq_hqq")
            ),
            *(f"{row['relative_error'][label]:.5f}" for label in CONTESTANTS),
        ]
        for row in rows
    ]
    speeds = f"{ABOUT}\n\nMw/s is millions of weights a second; ratios are of times.\n\n{markdown_table(header, lines)}"
    header = ["matrix", "bits", *(f"groups of {group_size}" for group_size in NORM_GROUP_SIZES)]
    lines = [
        [row["weights"], row["bits"], *(f"{ours / theirs:.3f}" for ours, theirs in row["objectives"].values())]
        for row in norms
    ]
    return f"{speeds}\n\n{ABOUT_NORM}\n\n{markdown_table(header, lines)}"


def main() -> None:
    """Run, show and keep."""
    quick = parser(__doc__).parse_args().quick
    shapes, rounds = (QUICK_SHAPES, 2) if quick else (SHAPES, 5)
    rows = [compare(shape, kind, bits, rounds) for shape in shapes for kind in WEIGHTS for bits in BITS]
    matrices = {kind: weights(shapes[0], kind) for kind in WEIGHTS} | {"expert": expert()}
    norms = [compare_norms(weight, kind, bits) for kind, weight in matrices.items() for bits in BITS]
    save("quantize", TITLE, {"speed": rows, "norm": norms}, render(rows, norms), quick)


if __name__ == "__main__":
    main()
