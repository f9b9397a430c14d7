"""What was measured of one matrix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What was measured of a matrix. `alpha` is None if it is undefined, `reason` then says why."""

    alpha: float | None
    tail_count: int
    eigenvalue_count: int
    variance: float
    mean_square: float
    largest_eigenvalue: float
    reason: str = ""


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
