"""What tests have done in a process of its own, which imports this module and no more."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from alphaq.errors import CheckpointError


def doubled(values: np.ndarray, shown: Callable[[Iterable[int], int, str], Iterable[int]]) -> np.ndarray:
    for label, count in (("first", 3), ("second", 0), ("third", 1)):
        assert list(shown(range(count), count, label)) == list(range(count))
    return 2 * values


def refused(shown: object) -> None:
    raise CheckpointError("It is damaged.")


def aborted(shown: object) -> None:
    os.write(2, b"said long before\n" * 100_000 + b"model.cpp:1: GGML_ASSERT(heads > 0) failed\n")
    os.write(1, b"not a message")
    os.abort()


def crashed(shown: object) -> None:
    ctypes.string_at(0)


def killed(shown: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def slept(mark: Path, shown: object) -> None:
    mark.write_text(str(os.getpid()))
    time.sleep(600)


class Counter:
    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, more: int) -> int:
        self.count += more
        return self.count
