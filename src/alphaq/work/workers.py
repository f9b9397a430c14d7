"""Spread independent tasks over processes; results come back in order, whatever the number.

A task must be a picklable value and its function a module-level one. What all tasks share (a
checkpoint, a plan) is sent to each process once. Look-ahead is bounded in number and in bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from alphaq.errors import WorkerError
from alphaq.work.cores import available_cores

S = TypeVar("S")
T = TypeVar("T")

Wrap = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""`wrap(items, total, label)` yields the items, showing progress or not."""


def silent(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """No progress shown."""
    return items


Size = Callable[[S], int]
"""The bytes that a task holds while it runs."""


def no_bytes(task: object) -> int:
    """Of tasks that hold next to nothing."""
    return 0


MAX_BYTES = 256 << 20  # of source data waiting or in work, beyond one task for each process
BYTES_PER_WORKER = 1 << 29  # below this, starting a process costs more than it gains
_shared: Any = None


def sensible_count(nbytes: int) -> int:
    """Workers for a job that reads so many bytes: all cores, fewer for a small job."""
    return max(1, min(available_cores(), nbytes // BYTES_PER_WORKER))


class Workers:
    """A pool of `count` processes with something to share; with a count of 1 all happens in this one."""

    cluster = False
    """Whether the workers are on other machines."""

    def __init__(self, count: int, shared: Any) -> None:
        self.count = count
        self.shared = shared
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count > 1:
            context = multiprocessing.get_context("spawn")  # forking a process that has threads can deadlock
            self._pool = ProcessPoolExecutor(self.count, context, _start, (self.shared,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def shares(self, folder: Path) -> bool:
        """Whether the workers can write into a folder of this machine; else results must be written by who asked."""
        return True

    def map(
        self, function: Callable[[Any, S], T], tasks: Iterable[S], size: Size[S] = no_bytes, on_card: bool = False
    ) -> Iterator[T]:
        """function(shared, task) for every task, in order.

        on_card: whether the task needs a GPU, which matters where nodes differ. Raises WorkerError if a process dies.
        """
        if self._pool is None:
            for task in tasks:
                yield function(self.shared, task)
            return
        waiting: deque[tuple[Future[T], int]] = deque()
        in_flight = 0
        try:
            for task in tasks:
                nbytes = size(task)
                while len(waiting) >= (self.count if in_flight + nbytes > MAX_BYTES else 4 * self.count):
                    future, freed = waiting.popleft()
                    yield future.result()
                    in_flight -= freed
                with _without_interrupts():  # which a process that it starts would not know how to take
                    waiting.append((self._pool.submit(_run, function, task), nbytes))
                in_flight += nbytes
            while waiting:
                yield waiting.popleft()[0].result()
        except BrokenProcessPool:
            raise WorkerError(
                "A worker process could not start or was killed, most likely for lack of memory. "
                "Run the same command again with fewer --workers; finished work is kept."
            ) from None


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the block's end, for good in processes that are started in it: the parent decides."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A parent that is killed outright cannot stop its workers; they stop themselves."""
    parent.join()
    os._exit(1)


def _run(function: Callable[[Any, S], T], task: S) -> T:
    return function(_shared, task)
