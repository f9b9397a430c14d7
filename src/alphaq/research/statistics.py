"""What the data-free scoring rules ask of one matrix: moments, column outliers and the stable rank.

    kurtosis    = E[(w − μ)⁴] / Var²                      (3 for a Gaussian, more for heavier tails)
    outlier     = maxⱼ max|W₍:,ⱼ₎| / mean|W₍:,ⱼ₎|          (QuantMoE-Bench, arXiv 2406.08155)
    stable rank = ‖W‖²_F / σ₁²                            (Rudelson and Vershynin, arXiv math/0503442)

Rows are read in panels whose size depends on the shape alone and whose float64 sums are added up in a
fixed order, so that memory stays bounded and no digit depends on the number of threads. For the same
reason no product here is left to a BLAS, whose order of summation is its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from alphaq.simd.sums import in_threads, row_parts, slices
from alphaq.spectra.measure import moments

ACCURACY = 1e-5  # relative error at which σ₁² counts as found, by estimate; float32 products give about 1e-6
MAX_STEPS = 128  # of Lanczos; a Gaussian matrix, whose top singular values crowd, asks for about 40
MIN_STEPS = 8  # before the distance to the second value is believed: it may not have been found yet
MAX_GROUPS = 32  # of panels: bounds what is kept of them until they are added up
_NO_SPREAD = 1e-28  # variance / mean square that float64 rounding alone can leave


@dataclass(frozen=True)
class WeightStatistics:
    """Moments of one matrix W, all dimensionless except mean_absolute and root_mean_square (units of W)."""

    mean_absolute: float
    root_mean_square: float
    kurtosis: float
    """E[(w − μ)⁴] / Var²; 3 for a Gaussian."""
    outlier: float
    """max over input columns j of max|W₍:,ⱼ₎| / mean|W₍:,ⱼ₎|; at least 1."""
    stable_rank: float
    """‖W‖²_F / σ₁²; from 1 to the smaller side."""


@dataclass(frozen=True)
class _Sums:
    """Sums over some rows. powers: Σ d, Σ d², Σ d³, Σ d⁴ of the deviations d = w − mean, and Σ |w|, float64 [5]."""

    powers: np.ndarray
    largest: np.ndarray  # max |w|, float64 [columns]
    absolute: np.ndarray  # Σ |w|, float64 [columns]


def weight_statistics(weight: torch.Tensor, name: str) -> WeightStatistics:
    """Statistics of a [rows, columns] matrix of any float dtype.

    The stable rank has a relative accuracy of 1e-4 or better, all else that of float64. Where a ratio is undefined it
    is neutral: a matrix without spread has kurtosis 3; a column of zeros has outlier 1; zeros have
    stable rank 1. Raises QuantizationError if the matrix holds NaN or infinity.
    """
    mean, _ = moments(weight, name)  # a first pass, so that the power sums below are of small deviations
    groups = _groups(*weight.shape)
    sums = in_threads(lambda group: _sums(weight, group, mean), groups)
    count = weight.numel()
    first, second, third, fourth, absolute = (
        math.fsum(column) / count for column in zip(*(part.powers for part in sums), strict=True)
    )
    mean_square = second + 2 * mean * first + mean * mean
    # `mean` carries the rounding of float32 runs: move the moments to the exact one.
    variance = second - first * first
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return WeightStatistics(
        mean_absolute=absolute,
        root_mean_square=math.sqrt(max(0.0, mean_square)),
        kurtosis=central / variance**2 if variance > _NO_SPREAD * mean_square else 3.0,
        outlier=_outlier(sums, weight.shape[0]),
        stable_rank=_stable_rank(weight, mean_square) if mean_square > 0 else 1.0,
    )


def _groups(rows: int, columns: int) -> list[list[slice]]:
    """Panels of whole rows, in at most 32 groups of neighbours."""
    parts = row_parts(rows, columns)
    return [parts[group] for group in slices(len(parts), -(-len(parts) // MAX_GROUPS))]


def _panel(weight: torch.Tensor, part: slice, kind: type[np.floating]) -> np.ndarray:
    """Some rows, row-major, in float32 or float64."""
    values = weight[part]
    if values.dtype.itemsize < 4:  # by way of float32: torch widens 16-bit floats to float64 many times slower
        values = values.float()
    return values.contiguous().numpy().astype(kind, copy=False)


def _sums(weight: torch.Tensor, group: list[slice], mean: float) -> _Sums:
    powers, largest, absolute = np.zeros(5), np.zeros(weight.shape[1]), np.zeros(weight.shape[1])
    for part in group:
        values = _panel(weight, part, np.float64)
        magnitude = np.abs(values)
        np.maximum(largest, magnitude.max(axis=0), out=largest)
        of_columns = magnitude.sum(axis=0)
        absolute += of_columns
        deviation = values - mean
        squared = deviation * deviation
        powers += (
            deviation.sum(),
            squared.sum(),
            (squared * deviation).sum(),
            (squared * squared).sum(),
            of_columns.sum(),
        )
    return _Sums(powers, largest, absolute)


def _outlier(sums: list[_Sums], rows: int) -> float:
    largest = np.max([part.largest for part in sums], axis=0)
    average = np.sum([part.absolute for part in sums], axis=0) / rows
    ratios = np.divide(largest, average, out=np.ones_like(largest), where=average > 0)
    return max(1.0, float(ratios.max()))


def _stable_rank(weight: torch.Tensor, mean_square: float) -> float:
    scale = min(mean_square**-0.5, 1e37)  # itself a float32
    return max(1.0, weight.numel() * mean_square * scale**2 / _largest_eigenvalue(weight, scale))


def _largest_eigenvalue(weight: torch.Tensor, scale: float) -> float:
    """scale²·σ₁² of a finite matrix [rows, columns] that is not zero, by Lanczos on WᵀW from a fixed start vector.

    scale: brings the weights near 1, because their products are float32. Every new direction is made
    orthogonal to all earlier ones, so that none is found twice. It ends when the estimated error, the
    residual or its square over the distance to the second value (Parlett, The Symmetric Eigenvalue
    Problem, 11.7), is below 1e-5 of the value, or after 128 steps.
    """
    rows, columns = weight.shape
    groups = _groups(rows, columns)
    start = np.random.Generator(np.random.PCG64(0)).random(columns) - 0.5
    steps = min(MAX_STEPS, rows + 1, columns)  # the rank, and one more for the start's part in the null space
    basis = np.empty((steps + 1, columns))
    basis[0] = start / _length(start)
    diagonal: list[float] = []
    off: list[float] = []
    value = 0.0
    for step in range(steps):
        new = _gram_product(weight, groups, basis[step], scale)
        diagonal.append(float(np.einsum("i,i->", basis[step], new)))
        for _ in range(2):  # twice: once leaves what cancellation lost
            new -= np.einsum("kj,k->j", basis[: step + 1], np.einsum("kj,j->k", basis[: step + 1], new))
        residual = _length(new)
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
        value = float(values[-1])
        error = residual * abs(float(vectors[-1, -1]))
        if step >= MIN_STEPS and values[-1] > values[-2]:
            error = min(error, error * error / float(values[-1] - values[-2]))
        if error <= ACCURACY * value:
            break
        off.append(residual)
        basis[step + 1] = new / residual
    return value


def _gram_product(weight: torch.Tensor, groups: list[list[slice]], vector: np.ndarray, scale: float) -> np.ndarray:
    """scale²·Wᵀ(W v), float64 [columns]; each panel is used for both products while it is in the cache."""
    right = (vector * scale).astype(np.float32)

    def partial(group: list[slice]) -> np.ndarray:
        total = np.zeros_like(vector)
        for part in group:
            panel = _panel(weight, part, np.float32)
            left = np.einsum("ij,j->i", panel, right) * np.float32(scale)
            total += np.einsum("ij,i->j", panel, left)
        return total

    product: np.ndarray = np.sum(in_threads(partial, groups), axis=0)
    return product


def _length(vector: np.ndarray) -> float:
    return math.sqrt(float(np.einsum("i,i->", vector, vector)))
