"""Lines of JSON that outlive a killed process: whatever was written whole is there, a torn end is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from alphaq.errors import JournalError

try:
    import fcntl
except ImportError:  # Windows has no such lock; two runs at once are then the user's to avoid
    fcntl = None  # type: ignore[assignment]


class Journal:
    """An append-only file of JSON objects, opened by one process at a time; `entries` is what it held then.

    Raises JournalError if another process has it open. The lock ends with the process, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise JournalError(f"Another alphaq is at work on {path.parent}. Wait for it to end.") from None
        except OSError:
            pass  # some network file systems have no locks either
        self.entries = self._recover()

    def _recover(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        entries: list[dict[str, Any]] = []
        good = 0
        for line in self._file:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            entries.append(entry)
            good += len(line)
        self._file.truncate(good)
        return entries

    def clear(self) -> None:
        """Forget everything."""
        self._file.truncate(0)
        self.entries = []

    def append(self, entry: dict[str, Any]) -> None:
        """Add an object; it survives this process from here on."""
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
