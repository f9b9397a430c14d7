"""Errors that choices leave on drawn weights, in the tables of docs/: python scripts/choice_errors.py

Σ(w − ŵ)²/Σw² of weights that anyone can draw again, by each way to store them and the quantizers named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch

import alphaq
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.formats.table import parse_choice, rate_of, storage_bytes
from alphaq.nouns.choice import Choice
from alphaq.quantizers.affine import quantize_affine
from alphaq.quantizers.base import rounder_of
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.quantizers.rounded import rounded

MODEL = Path(__file__).parents[1] / "src" / "alphaq" / "data" / "tiny"
GGML = ("MXFP4", "TQ1_0", "TQ2_0", "NVFP4", "Q1_0", "Q2_0", "Q4_0")
TRELLIS = (("t1", "1g128"), ("t1.5", None), ("t2", "2g128"), ("t3", "3g128"), ("t4", "4g128"))
CODED = ("2g128", "@2", "3g128", "@3", "4g128", "@4")
WITHIN = ("1g128", "1g128-pb2", "1g128-pb4", "2g128", "2g128-slim", "1g128-pb8", "3g128")
MLX_BITS = (2, 3, 4, 5, 6, 8)


def gaussian(rows: int, columns: int) -> torch.Tensor:
    """Standard normal weights [rows, columns], float32."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((rows, columns), np.float32))


def student(rows: int, columns: int) -> torch.Tensor:
    """Weights [rows, columns] of Student's t with 4 degrees of freedom, float32."""
    return torch.from_numpy(np.random.default_rng(0).standard_t(4, (rows, columns)).astype(np.float32))


@dataclass(frozen=True)
class Left:
    """What a choice leaves of some matrices: Σ(w − ŵ)²/Σw², and the bits that a weight is stored in."""

    error: float
    bits: float


def left(weights: Sequence[torch.Tensor], choice: Choice, quantizer: str = "debiased") -> Left:
    """By a quantizer of native files; bytes as they are coded where the choice is for coded files."""
    found = [rounded(weight, choice, "drawn", rounder_of(quantizer)) for weight in weights]
    coded = bool(rate_of(choice))
    sizes = [
        one.coded_bytes() if coded else storage_bytes(choice, tuple(weight.shape))
        for one, weight in zip(found, weights, strict=True)
    ]
    energy = sum(float(weight.double().square().sum()) for weight in weights)
    return Left(
        sum(one.squared_error for one in found) / energy, 8 * sum(sizes) / sum(weight.numel() for weight in weights)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["--:"] * len(head), *rows))


def ggml_types() -> str:
    """llama.cpp's types for models that were trained in them, on 512 × 1024 weights."""
    weight = gaussian(512, 1024)
    energy = float(weight.double().square().sum())
    rows = []
    for name in GGML:
        _, block, size = GGML_BLOCKS[name]
        found = quantize_ggml(weight, parse_choice(name), "drawn")
        assert found.squared_error is not None
        rows.append((name, f"{8 * size / block:.4g}", f"{block}", f"{found.squared_error / energy:.2g}"))
    return table(("type", "bits", "block", "error"), rows)


def trellis_codes() -> str:
    """Trellis codes beside plain groups, on 64 × 2048 weights: by the default and, in brackets, by `mse`."""
    weights = [gaussian(64, 2048)]

    def cell(text: str | None) -> tuple[str, float]:
        if text is None:
            return "–", math.nan
        ours, least = (left(weights, parse_choice(text), quantizer) for quantizer in ("debiased", "mse"))
        return f"`{text}` {ours.bits:.2f}: {ours.error:.3g} ({least.error:.3g})", ours.bits

    rows = []
    for trellis, plain in TRELLIS:
        told, bits = cell(trellis)
        rows.append((trellis[1:], told, cell(plain)[0], f"{4**-bits:.3g}"))
    return table(("bits per weight", "trellis", "plain groups", "no code can have less"), rows)


def mlx_choices() -> str:
    """MLX's own quantizer and ours, on 2048 × 1408 weights in bfloat16, values computed in float32."""
    weight = gaussian(2048, 1408).bfloat16()
    exact = weight.float()
    energy = float(exact.double().square().sum())
    given = mx.array(exact.numpy()).astype(mx.bfloat16)

    def by_mlx(bits: int) -> float:
        codes, scales, offsets = mx.quantize(given, group_size=64, bits=bits)
        scales, offsets = scales.astype(mx.float32), offsets.astype(mx.float32)
        restored = np.array(mx.dequantize(codes, scales, offsets, group_size=64, bits=bits))
        return float((torch.from_numpy(restored) - exact).double().square().sum()) / energy

    def by_ours(bias_weight: float | None) -> Callable[[int], float]:
        options = {} if bias_weight is None else {"bias_weight": bias_weight}

        def error(bits: int) -> float:
            found = quantize_affine(weight, Choice(bits, 64), "drawn", **options).squared_error
            assert found is not None
            return found / energy

        return error

    contestants = {"`mx.quantize`": by_mlx, "AlphaQ": by_ours(None), "AlphaQ, least squares": by_ours(1.0)}
    rows = ((name, *(f"{error(bits):.3g}" for bits in MLX_BITS)) for name, error in contestants.items())
    return table(("", *(f"{bits}g64" for bits in MLX_BITS)), rows)


def coded_files() -> str:
    """Groups as they are stored, and one step for a whole matrix as it is coded, on 1408 × 2048 weights."""
    weights = [gaussian(1408, 2048)]
    found = {text: left(weights, parse_choice(text)) for text in CODED}
    rows = (
        (f"{one.bits:.2f}", f"{one.error:.3g}", f"{one.error * 4**one.bits:.1f}", f"`{text}`")
        for text, one in found.items()
    )
    return table(("stored bits per weight", "relative squared error", "× 2^(−2R)", ""), rows)


def widths_within() -> str:
    """Widths within a matrix, on the bundled model's gate matrices and on 1024 × 2048 drawn weights."""
    source = open_checkpoint(MODEL)
    gates = [source.read(matrix) for matrix in source.planned if matrix.projection == "gate"]
    kinds = (gates, [gaussian(1024, 2048)], [student(1024, 2048)])
    rows = []
    for text in WITHIN:
        found = [left(weights, parse_choice(text)) for weights in kinds]
        rows.append((f"`{text}`", f"{found[1].bits:.2f}", *(f"{one.error:.3f}" for one in found)))
    return table(("", "bits/weight", "bundled model", "Gaussian", "Student's t"), rows)


def main() -> None:
    told = f"Version {alphaq.__version__}, {date.today()}, `python scripts/choice_errors.py`."
    for made in (ggml_types, trellis_codes, mlx_choices, coded_files, widths_within):
        print(f"{made.__doc__}\n\n{made()}\n\n{told}\n", flush=True)


if __name__ == "__main__":
    main()
