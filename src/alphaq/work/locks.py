"""One process at a time, where two would spoil each other's work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such lock; two runs at once are then the user's to avoid
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for other processes that are in here with the same file, which is made and stays. Ends with the process."""
    with path.open("a") as file:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks either
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
