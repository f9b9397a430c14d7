"""Half-quadratic quantization: grids of least Σ|w − ŵ|^p, p < 1, to which few large errors matter little; no data.

A grid per group, stored as everywhere: a float16 step s and an integer zero point z, ŵ = s·(q − z). Half-quadratic
splitting lets an error e absorb what a grid had better give up, e = sign(x) · max(|x| − |x|^(p−1)/β, 0) of the misses
x, and fits the grid to the rest, z ← mean(q − (w − e)/s) and s by least squares, with β growing from step to step
(Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023). That finds the nearest of many
minima; so sixteen steps come first, then neighbours of the best in step and zero point. What is kept has the least
Σ|w − ŵ|^p of all that was tried. Misses count in steps: nothing depends on the unit of the weights.
Steps stay near those that just span the group. Free ones would give up its ends for a still smaller Σ|w − ŵ|^p, at 4
bits for twice the squared error and four times the divergence of the model.
One bit stores two levels per group, moved in turn from those of least squares.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.hqq_kernels import quantize_rows_by_norm
from alphaq.quantizers.rows import quantized
from alphaq.simd.sums import in_threads, row_parts
from alphaq.simd.vectors import LANES

NORM = 0.7
SLACK = {1: 0.0, 2: 0.5, 3: 0.75, 4: 1.33, 5: 2, 6: 3, 7: 4, 8: 5}  # in codes: how far a grid may miss a group's ends
NEIGHBOUR = 0.3  # of the slack: steps tried beside the best
ONE_BIT_REACH = (0.75, 0.15, 0.03)


def quantize_hqq(weight: torch.Tensor, choice: Choice, name: str = "matrix", norm: float = NORM) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix for the least Σ|w − ŵ|^norm, norm from 0.1 to 2.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    settings = _trials(choice.bits), np.float32(relative_slack(choice.bits)), np.float32(norm)
    return quantized(quantize_rows_by_norm, settings, weight, choice, name)


def lp_objective(weight: torch.Tensor, restored: torch.Tensor, p: float = NORM) -> float:
    """Σ|w − ŵ|^p of two [rows, columns] matrices, in float64."""

    def objective(part: slice) -> float:
        return float((weight[part].double() - restored[part].double()).abs_().pow_(p).sum())

    return math.fsum(in_threads(objective, row_parts(*weight.shape)))


def relative_slack(bits: int) -> float:
    """How much larger or smaller a step may be than one that just spans a group, relative."""
    return SLACK[bits] / (2**bits - 1)


@lru_cache
def _trials(bits: int) -> np.ndarray:
    """Which grids are tried, as `quantize_rows_by_norm` wants them: float32, sixteen to a row."""
    if bits == 1:
        moves = np.arange(-LANES // 2, LANES // 2) / (LANES // 2)  # 0 among them
        return np.concatenate([reach * moves for reach in ONE_BIT_REACH]).astype(np.float32)
    factors = 1 + NEIGHBOUR * relative_slack(bits) * np.linspace(-1, 1, LANES // 2)
    shifts = np.repeat([-1.0, 1.0], LANES // 2)
    return np.concatenate([np.linspace(0, 1, LANES), factors, factors, shifts]).astype(np.float32)
