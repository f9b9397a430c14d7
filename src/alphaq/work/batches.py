"""Tasks in batches, and which node of a cluster one goes to: the part that needs no cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

S = TypeVar("S")
BATCH_BYTES, BATCH_TASKS = 64 << 20, 256  # of source data; of tasks, where those are tiny
FIRST_BYTES, FIRST_TASKS = 1 << 20, 4  # so that a small job is spread too; doubled each time all have got one


@dataclass(frozen=True)
class Node:
    """A node as a driver sees it. files: the weight files it can read, None for all."""

    id: str
    name: str
    cores: int
    cards: int = 0
    files: frozenset[str] | None = None

    def slots(self, on_card: bool) -> int:
        """Batches it can work on at the same time."""
        return self.cards if on_card else self.cores

    def can(self, needed: frozenset[str], on_card: bool) -> bool:
        """Whether it can do what needs these files, and a card or not."""
        return self.slots(on_card) > 0 and (self.files is None or needed <= self.files)


@dataclass
class Batch:
    """Consecutive tasks that need the same files."""

    tasks: list[Any]
    nbytes: int
    needed: frozenset[str]
    tries: int = 0
    node: str | None = None
    """Where it is, until it is done there."""
    where: str = ""
    refs: tuple[Any, Any] | None = None
    done: bool = False


def choose(nodes: Iterable[Node], load: Mapping[str, int], needed: frozenset[str], on_card: bool) -> Node | None:
    """The node with the most room for what needs these files; None if all have one more than they can work on."""
    room = [(node.slots(on_card) + 1 - load.get(node.id, 0), node) for node in nodes if node.can(needed, on_card)]
    best = max(room, key=lambda pair: pair[0], default=None)
    return best[1] if best is not None and best[0] > 0 else None


def limited(nodes: Sequence[Node], most: int | None) -> list[Node]:
    """The nodes with no more than `most` cores in all, taken from each in turn."""
    if most is None or sum(node.cores for node in nodes) <= most:
        return list(nodes)
    allotted = [0] * len(nodes)
    for _ in range(most):
        room = (index for index, node in enumerate(nodes) if allotted[index] < node.cores)
        least = min(room, key=lambda index: allotted[index])
        allotted[least] += 1
    return [Node(n.id, n.name, cores, n.cards, n.files) for n, cores in zip(nodes, allotted, strict=True)]


def batches(
    tasks: Iterable[S], size: Callable[[S], int], needs: Callable[[S], frozenset[str]], slots: int
) -> Iterator[Batch]:
    """Consecutive tasks in batches, small at first."""
    made = 0
    batch = Batch([], 0, frozenset())
    for task in tasks:
        nbytes, needed = size(task), needs(task)
        growth = 1 << min(made // max(slots, 1), 20)
        most_bytes, most_tasks = min(BATCH_BYTES, FIRST_BYTES * growth), min(BATCH_TASKS, FIRST_TASKS * growth)
        full = batch.nbytes + nbytes > most_bytes or len(batch.tasks) >= most_tasks
        if batch.tasks and (full or needed != batch.needed):
            yield batch
            made += 1
            batch = Batch([], 0, frozenset())
        batch.needed = needed
        batch.tasks.append(task)
        batch.nbytes += nbytes
    if batch.tasks:
        yield batch
