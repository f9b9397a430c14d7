"""Kernels are compiled by one of the tests' processes, and loaded by the others: nothing else is compiled so often at once.

On a fresh clone every worker needs the same kernels in its first minutes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

from numba.core.dispatcher import Dispatcher


def compile_in_turn() -> None:
    """From now on, wait for another process that compiles the same kernel, and then load what it has kept."""
    try:
        import fcntl
    except ImportError:  # where workers compile each for itself
        return
    path = Path(tempfile.gettempdir()) / f"alphaq-tests-compile-{os.getuid()}.lock"
    file, compiled = path.open("a+b"), Dispatcher.compile

    @contextmanager
    def turn(index: str) -> Iterator[None]:
        """One byte of the file for each kernel: what a kernel calls is compiled within its turn, and never calls it."""
        place = crc32(index.encode())
        fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, place)

    def compile_or_load(self: Any, sig: Any) -> Any:
        cache = getattr(self._cache, "_cache_file", None)  # none: this kernel is not kept
        if cache is None or self._cache._index_key(sig, self.targetctx.codegen()) in cache._load_index():
            return compiled(self, sig)
        with turn(cache._index_path):
            return compiled(self, sig)

    Dispatcher.compile = compile_or_load
