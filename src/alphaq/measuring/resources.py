"""What work is done with: processes, what earlier runs measured, how progress is shown, and on which device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import Checkpoint
from alphaq.measuring.cache import Cache
from alphaq.work.workers import S, Size, T, Workers, Wrap, no_bytes, silent


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
        if self.workers is None:
            return Workers(1, checkpoint)
        whole: Checkpoint = self.workers.shared
        alike = not checkpoint.dropped or whole.dropped == checkpoint.dropped
        return self.workers if alike else _OfPruned(self.workers, checkpoint)


class _OfPruned(Workers):
    """Another pool's processes, to which the checkpoint that they share lacks some experts."""

    def __init__(self, whole: Workers, pruned: Checkpoint) -> None:
        super().__init__(whole.count, pruned)
        self.whole, self.cluster = whole, whole.cluster

    def shares(self, folder: Path) -> bool:
        """See the other pool."""
        return self.whole.shares(folder)

    def map(
        self, function: Callable[[Any, S], T], tasks: Iterable[S], size: Size[S] = no_bytes, on_card: bool = False
    ) -> Iterator[T]:
        """function(pruned checkpoint, task) for every task, in order."""
        return self.whole.map(partial(_pruned, function, dict(self.shared.dropped)), tasks, size, on_card)


_known: dict[str, Checkpoint] = {}


def _pruned(function: Callable[[Any, S], T], dropped: Mapping[int, tuple[int, ...]], whole: Checkpoint, task: S) -> T:
    key = f"{whole.fingerprint} {sorted(dropped.items())}"
    if key not in _known:
        _known.clear()
        _known[key] = without_experts(whole, dropped, uneven=True)
    return function(_known[key], task)


USUAL = Resources()
"""This process alone, without progress."""
