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
