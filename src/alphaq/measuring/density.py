"""The density of one matrix's eigenvalues on logarithmic axes, small enough to keep for many, and its fitted tail.

A power law p(λ) = (k/n)·((α − 1)/xmin)·(λ/xmin)^(−α) above the tail's start is a straight line there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import SpectrumError
from alphaq.nouns.matrix import MatrixRef
from alphaq.research.tails import eigenvalues_of, variant_exponent
from alphaq.spectra.measure import moments
from alphaq.spectra.tail import ROUNDING
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant

BINS = 48
BELOW = 0.02
"""Share of the eigenvalues below the first bin: the smallest reach many decades down and say nothing of the tail."""


@dataclass(frozen=True)
class Density:
    """Counts of eigenvalues in equal bins of log₁₀ λ from `low` to `high`, and the fit.

    counts: int [bins]. below: eigenvalues under the first bin. start: xmin of the tail, 0 without one; tail_count: how
    many eigenvalues α was fitted to. alpha: None where it is undefined, `reason` then says why.
    """

    low: float
    high: float
    counts: np.ndarray
    below: int
    start: float
    tail_count: int
    alpha: float | None
    reason: str = ""

    @property
    def count(self) -> int:
        """All eigenvalues."""
        return int(self.counts.sum()) + self.below

    def fitted(self, eigenvalues: np.ndarray) -> np.ndarray:
        """The law's density at eigenvalues from the start on; needs an α."""
        assert self.alpha is not None  # the caller looks
        height = self.tail_count / self.count * (self.alpha - 1) / self.start
        return np.asarray(height * (eigenvalues / self.start) ** -self.alpha)


@dataclass(frozen=True)
class DensityTask:
    """One matrix whose density is wanted."""

    matrix: MatrixRef
    variant: SpectrumVariant = FAST_VARIANT
    bins: int = BINS


def density_one(checkpoint: Checkpoint, task: DensityTask) -> Density:
    """Read one matrix and describe its spectrum. Raises QuantizationError if it holds NaN or infinity."""
    weight = checkpoint.read(task.matrix)
    moments(weight, task.matrix.name)
    return density(eigenvalues_of(weight, task.matrix.name, task.variant), task.variant, task.bins)


def density(eigenvalues: torch.Tensor, variant: SpectrumVariant = FAST_VARIANT, bins: int = BINS) -> Density:
    """Histogram and fit of an ascending spectrum [n]."""
    values = eigenvalues.double().numpy()
    alpha, tail, start, reason = None, 0, 0.0, ""
    try:
        alpha, tail = variant_exponent(eigenvalues, variant.tail)
        start = float(values[-tail - 1] if variant.tail == "hill" else values[-tail])  # Hill's k leaves out xmin
    except SpectrumError as error:
        reason = str(error)
    positive = values[values > ROUNDING * values[-1]]
    if not len(positive):
        return Density(0.0, 0.0, np.zeros(bins, np.int64), len(values), 0.0, 0, None, reason or "The matrix is zero.")
    low = float(np.log10(positive[int(BELOW * len(positive))]))
    high = float(np.log10(positive[-1]))
    if not high > low:  # all alike: a bin around them
        low, high = low - 0.05, high + 0.05
    places = np.clip(((np.log10(positive) - low) / (high - low) * bins).astype(np.int64), -1, bins - 1)
    places[np.log10(positive) < low] = -1
    counts = np.bincount(places[places >= 0], minlength=bins)
    return Density(low, high, counts, len(values) - int(counts.sum()), start, tail, alpha, reason)
