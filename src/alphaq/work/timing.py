"""How long something takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

LEAST_ROUNDS, LEAST_S = 9, 0.4


def usual_seconds(work: Callable[[], object]) -> float:
    """The median of many times, after one that does not count."""
    work()
    taken: list[float] = []
    while len(taken) < LEAST_ROUNDS or sum(taken) < LEAST_S:
        taken.append(seconds(work))
    return statistics.median(taken)


def seconds(work: Callable[[], object]) -> float:
    """Of once."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
