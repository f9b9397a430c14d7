"""What work is done with: processes, what earlier runs measured, how progress is shown, and on which device."""

from __future__ import annotations

from dataclasses import dataclass

from alphaq.checkpoint.reader import Checkpoint
from alphaq.measuring.cache import Cache
from alphaq.work.workers import Workers, Wrap, silent


@dataclass(frozen=True)
class Resources:
    """What a run may use. It changes how long work takes, never what comes of it.

    workers: share the checkpoint that is worked on; None for this process alone. cache: None keeps nothing.
    device: "cpu" is our own kernel, anything else torch's name of a device.
    """

    workers: Workers | None = None
    cache: Cache | None = None
    wrap: Wrap = silent
    device: str = "cpu"

    def pool(self, checkpoint: Checkpoint) -> Workers:
        """The processes that work on a checkpoint."""
        return self.workers or Workers(1, checkpoint)


USUAL = Resources()
"""This process alone, without progress."""
