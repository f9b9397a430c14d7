"""Work that is done partly here, partly by workers that do not have the output's folder; results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from alphaq.work.workers import Workers


class Sized(Protocol):
    """A task that knows how much memory it takes."""

    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=Sized)
R = TypeVar("R")
T = TypeVar("T")


class Here(Generic[R]):
    """What was done here; a result of its own, since None may be one."""

    def __init__(self, result: R) -> None:
        self.result = result


def partly_here(
    workers: Workers,
    tasks: Iterable[S],
    here: Callable[[S], Here[R] | None],
    sent: Callable[[S], S],
    away: Callable[[Any, S], T],
    received: Callable[[S, T], R],
) -> Iterator[R]:
    """A result for each task: what `here` makes of it or, where that is None, what is `received` of a worker's work.

    sent: a task as it is sent away. away: what the worker does, a module-level function.
    """
    waiting: deque[tuple[S, Here[R] | None]] = deque()

    def left() -> Iterator[S]:
        for task in tasks:
            own = here(task)
            waiting.append((task, own))
            if own is None:
                yield sent(task)

    for made in workers.map(away, left(), lambda task: task.nbytes):
        yield from _done(waiting)
        yield received(waiting.popleft()[0], made)
    yield from _done(waiting)


def _done(waiting: deque[tuple[S, Here[R] | None]]) -> Iterator[R]:
    """What was done here of the tasks that come next."""
    while waiting and (own := waiting[0][1]) is not None:
        waiting.popleft()
        yield own.result
