"""Tail exponent: how heavy the upper tail of a spectrum is. Smaller α, heavier tail, better trained.

If the density of eigenvalues falls as λ^(−α) above a start λ₍ₙ₋ₖ₎, the maximum-likelihood estimate is
α = 1 + k / Σᵢ ln(λᵢ / λ₍ₙ₋ₖ₎) over the k largest (Hill, 1975).
"""

from __future__ import annotations

import torch

from alphaq.errors import SpectrumError

TAIL_FRACTION = 0.1
MIN_TAIL = 10


def tail_count(eigenvalue_count: int, fraction: float = TAIL_FRACTION) -> int:
    """k = max(10, ⌊fraction · n⌋), at least 1 and at most n − 1."""
    return max(1, min(eigenvalue_count - 1, max(MIN_TAIL, int(fraction * eigenvalue_count))))


def hill_exponent(eigenvalues: torch.Tensor, fraction: float = TAIL_FRACTION) -> float:
    """Power-law exponent α of the upper tail of an ascending spectrum [n]. Dimensionless.

    Raises SpectrumError if the tail start is not positive (rank too low) or the tail has no spread.
    """
    count = eigenvalues.numel()
    return tail_exponent(eigenvalues[max(0, count - 1 - tail_count(count, fraction)) :], count)


def tail_exponent(largest: torch.Tensor, count: int) -> float:
    """`hill_exponent` from the k + 1 largest of `count` eigenvalues alone, ascending; λ₍ₙ₋ₖ₎ is the first."""
    if count < 2:
        raise SpectrumError(f"A tail needs two eigenvalues, this spectrum has {count}.")
    tail = len(largest) - 1
    start = float(largest[0])
    # Rounding leaves a rank-deficient spectrum with tiny positive values; they are zero in float32.
    floor = float(largest[-1]) * torch.finfo(torch.float32).eps
    if not start > floor:
        raise SpectrumError(f"Fewer than {tail + 1} of {count} eigenvalues are positive: the rank is too low.")
    log_ratio = float((largest[1:].double() / start).log().sum())
    if not log_ratio > 0:
        raise SpectrumError(f"The {tail} largest of {count} eigenvalues are equal: the tail has no spread.")
    return 1.0 + tail / log_ratio
