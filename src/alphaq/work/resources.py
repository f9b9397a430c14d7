"""What a job may use: processes, a cache of measurements, a device; and how it shows progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alphaq.work.workers import Workers, Wrap, silent

if TYPE_CHECKING:
    from alphaq.measuring.cache import Cache


@dataclass(frozen=True)
class Resources:
    """What is passed on from a command to every stage that works on many matrices.

    workers: None for this process alone. cache: None to measure anew. device: where eigenvalues are computed, by
    torch's name.
    """

    workers: Workers | None = None
    cache: Cache | None = None
    wrap: Wrap = silent
    device: str = "cpu"

    def workers_on(self, shared: Any) -> Workers:
        """The workers, or this process with what all tasks share."""
        return self.workers or Workers(1, shared)


USUAL = Resources()
"""This process alone, without progress."""
