"""How long something takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

LEAST_ROUNDS, LEAST_S = 9, 0.2
AGREEING = 1.5


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


def agree(sittings: Sequence[float]) -> bool:
    """Whether the two shortest of several times in seconds are alike, so that others did not disturb them."""
    first, second = sorted(sittings)[:2]
    return second <= AGREEING * first
