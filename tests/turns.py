"""What several of the tests' processes need is made by one of them, and the others wait for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any
from zlib import crc32

from numba.core.dispatcher import Dispatcher

try:
    import fcntl
except ImportError:  # Windows: each for itself
    fcntl = None  # type: ignore[assignment]


@cache
def _file() -> IO[bytes]:
    """Open for as long as this process: closing a file gives up its locks."""
    return (Path(tempfile.gettempdir()) / f"alphaq-tests-{os.getuid()}.lock").open("a+b")


@contextmanager
def turn(name: str) -> Iterator[None]:
    """Keep other processes out of what has the same name: one byte of a file stands for each name."""
    if fcntl is None:
        yield
        return
    place = crc32(name.encode())
    fcntl.lockf(_file(), fcntl.LOCK_EX, 1, place)
    try:
        yield
    finally:
        fcntl.lockf(_file(), fcntl.LOCK_UN, 1, place)


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, which the first process that asks for it makes."""
    with turn(str(folder)):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}-{os.getpid()}")
            make(partial)
            partial.rename(folder)
    return folder


def compile_in_turn() -> None:
    """From now on, wait for another process that compiles the same kernel, and load what it has kept.

    On a fresh clone all workers need the same kernels in their first minutes. What a kernel calls is compiled within
    its turn and never calls it, so that no two processes wait for one another.
    """
    compiled = Dispatcher.compile

    def compile_or_load(self: Any, sig: Any) -> Any:
        kept = getattr(self._cache, "_cache_file", None)  # None: this kernel is not kept
        if kept is None or self._cache._index_key(sig, self.targetctx.codegen()) in kept._load_index():
            return compiled(self, sig)
        with turn(kept._index_path):
            return compiled(self, sig)

    Dispatcher.compile = compile_or_load
