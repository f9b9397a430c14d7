"""Other ways to measure α, for researchers: which eigenvalues, and where their power-law tail is taken to start.

If the density of eigenvalues falls as λ^(−α) above xmin, the maximum-likelihood estimate from the m
eigenvalues λⱼ ≥ xmin is α = 1 + m / Σⱼ ln(λⱼ / xmin). The variants differ in xmin (Clauset, Shalizi and
Newman, arXiv 0706.1062, for the search; WeightWatcher and AlphaQ's reference for the two rules of thumb):

- `hill`: the top tenth of the eigenvalues, at least ten (`alphaq.spectra.tail`, the default everywhere else);
- `median`: the median eigenvalue (the reference's `xmin_mid`);
- `finger`: searched between 0.95 and 1.5 times the mode of the log-histogram, so that a few separated
  large eigenvalues ("fingers") cannot pull xmin up to them (the reference's `xmin_peak`);
- `ks`: searched over all positive eigenvalues.

"Searched" means: the xmin at which the fitted law F(λ) = 1 − (λ / xmin)^(1−α) has the least
Kolmogorov–Smirnov distance maxⱼ |F(λⱼ) − j/m|, j = 0 … m − 1, to the eigenvalues above it.

All eigenvalues here are found in float64: rounding moves each by about ε·λ_max, which in float32 is as
much as the smallest ones of a nearly square matrix, and all tails but `hill` look down to them (the
histogram of `finger` begins at the least). The last digits can depend on the LAPACK and its threads.

This is the readable path. `alphaq.spectra.measure.spectrum` is the fast one, for `farms` and `hill` only.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from alphaq.errors import SpectrumError
from alphaq.nouns.settings import Tail
from alphaq.nouns.spectrum import Spectrum
from alphaq.spectra.eigenvalues import pooled_eigenvalues, whole_eigenvalues
from alphaq.spectra.farms import blocks
from alphaq.spectra.measure import moments
from alphaq.spectra.tail import NO_SPREAD, ROUNDING, hill_exponent, tail_count, too_few
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant

MAX_CANDIDATES = 512
HISTOGRAM_BINS = 100
FINGER_WINDOW = (0.95, 1.5)


def variant_spectrum(weight: torch.Tensor, name: str, variant: SpectrumVariant) -> Spectrum:
    """Measure a [rows, columns] matrix as `variant` says. `name` seeds the block sampling of `farms`.

    tail_count is the number of eigenvalues that α was fitted to, 0 if α is None.
    Raises QuantizationError if the matrix holds NaN or infinity.
    """
    mean, mean_square = moments(weight, name)
    eigenvalues = eigenvalues_of(weight, name, variant)
    alpha, tail, reason = None, 0, ""
    try:
        alpha, tail = variant_exponent(eigenvalues, variant.tail)
    except SpectrumError as error:
        reason = str(error)
    return Spectrum(
        alpha=alpha,
        tail_count=tail,
        eigenvalue_count=eigenvalues.numel(),
        variance=max(0.0, mean_square - mean * mean),
        mean_square=mean_square,
        largest_eigenvalue=float(eigenvalues[-1]),
        reason=reason,
    )


def eigenvalues_of(weight: torch.Tensor, name: str, variant: SpectrumVariant = FAST_VARIANT) -> torch.Tensor:
    """The eigenvalues that `variant` looks at, ascending float64 [n]."""
    return whole_eigenvalues(weight) if variant.blocks == "whole" else pooled_eigenvalues(blocks(weight, name).double())


def variant_exponent(eigenvalues: torch.Tensor, tail: Tail) -> tuple[float, int]:
    """α of an ascending spectrum [n], dimensionless, and the number of eigenvalues it was fitted to.

    That number is Hill's k, which leaves out xmin itself, or m, which as in Clauset et al. counts it.

    Raises SpectrumError if it is undefined: fewer than two eigenvalues, too few positive ones (no more
    than Hill's k; for `median`, less than half), or no tail with any spread.
    """
    if tail == "hill":
        return hill_exponent(eigenvalues), tail_count(eigenvalues.numel())
    values = eigenvalues.double().numpy()
    count = len(values)
    if count < 2:
        raise SpectrumError(f"A tail needs two eigenvalues, this spectrum has {count}.")
    zeros = int(np.searchsorted(values, values[-1] * ROUNDING, side="right"))
    middle = min(count // 2, count - 2)  # of an even number the upper one, as in the reference
    needed = count - middle if tail == "median" else tail_count(count) + 1
    if count - zeros < needed:
        raise too_few(needed, count)
    logs = np.log(values[zeros:])
    if not logs[-1] - logs[0] > NO_SPREAD:
        raise _no_spread(len(logs))
    first, last = 0, len(logs) - 2
    if tail == "median":
        first = last = middle - zeros
    elif tail == "finger":
        first, last = _finger_window(logs)
    return _least_distance(logs, first, min(last, len(logs) - 2))


def _finger_window(logs: np.ndarray) -> tuple[int, int]:
    """First and last index of the ascending ln λ [n] inside the window around the mode.

    The mode is the lower edge of the fullest of 100 equal bins of ln λ, as in WeightWatcher and the
    reference. (The reference compares the *logarithm* of the window's lower end with λ itself, which
    admits almost all that lies below; here both ends are on one scale.)
    """
    counts, edges = np.histogram(logs, HISTOGRAM_BINS)
    mode = edges[counts.argmax()]
    low, high = (mode + math.log(factor) for factor in FINGER_WINDOW)
    return int(np.searchsorted(logs, low, side="left")), int(np.searchsorted(logs, high, side="right")) - 1


def _least_distance(logs: np.ndarray, first: int, last: int) -> tuple[float, int]:
    """α and m at the start among `first` … `last` with the least Kolmogorov–Smirnov distance; logs: ln λ ascending [n].

    At most 512 starts are tried, those whose tail lengths m are spaced equally in ln m: the standard error
    (α − 1) / √m changes by the same factor from each to the next, and the work is O(512·n) at worst.
    """
    count = len(logs)
    above = np.cumsum(logs[::-1])[::-1]  # Σ ln λⱼ over j ≥ i
    best = (math.inf, 0.0, 0)
    for start in _candidates(count, first, last):
        tail = count - start
        log_ratio = above[start] - tail * logs[start]
        if not log_ratio > tail * NO_SPREAD:
            continue
        exponent = tail / log_ratio  # α − 1
        fitted = -np.expm1(-exponent * (logs[start:] - logs[start]))
        distance = float(np.abs(fitted - np.arange(tail) / tail).max())
        best = min(best, (distance, 1.0 + exponent, tail))
    if not best[2]:
        raise _no_spread(count)
    return float(best[1]), int(best[2])


def _no_spread(count: int) -> SpectrumError:
    return SpectrumError(f"The {count} positive eigenvalues have no tail with any spread.")


def _candidates(count: int, first: int, last: int) -> list[int]:
    """At most 512 of the indices first … last, both among them, spaced equally in ln(count − index)."""
    if last - first < MAX_CANDIDATES:
        return list(range(first, last + 1))
    lengths = np.geomspace(count - first, count - last, MAX_CANDIDATES)
    return np.unique(count - np.rint(lengths).astype(int)).tolist()
