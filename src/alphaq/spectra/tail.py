"""Tail exponent: how heavy the upper tail of a spectrum is. Smaller α, heavier tail, better trained.

If the density of eigenvalues falls as λ^(−α) above a start λ₍ₙ₋ₖ₎, the maximum-likelihood estimate is
α = 1 + k / Σᵢ ln(λᵢ / λ₍ₙ₋ₖ₎) over the k largest (Hill, 1975).
"""

from __future__ import annotations

import torch

from alphaq.errors import SpectrumError

TAIL_FRACTION = 0.1
MIN_TAIL = 10
ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of the largest eigenvalue: what float32 can leave where the exact one is zero, in every estimator."""
NO_SPREAD = 1e-5
"""Mean ln(λᵢ / λ₍ₙ₋ₖ₎) of a tail, or less, whose eigenvalues may differ by rounding alone."""


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
    if not start > ROUNDING * float(largest[-1]):
        raise too_few(tail + 1, count)
    log_ratio = float((largest[1:].double() / start).log().sum())
    if not log_ratio > tail * NO_SPREAD:
        raise SpectrumError(f"The {tail} largest of {count} eigenvalues are equal: the tail has no spread.")
    return 1.0 + tail / log_ratio


def too_few(needed: int, count: int) -> SpectrumError:
    """The error of a spectrum with less than the eigenvalues needed above rounding."""
    return SpectrumError(
        f"Fewer than {needed} of {count} eigenvalues are above a millionth of the largest: the rank is too low."
    )
