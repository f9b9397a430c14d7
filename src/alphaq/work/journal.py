"""Lines of JSON that outlive a killed process: whatever was written whole is there, a torn end is dropped."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from io import FileIO
from pathlib import Path

from alphaq.errors import JournalError
from alphaq.work.untrusted import JsonObject

try:
    import fcntl
except ImportError:  # Windows has no such lock; two runs at once are then the user's to avoid
    fcntl = None  # type: ignore[assignment]


class Journal:
    """An append-only file of JSON objects, opened by one process at a time; `entries` is what it held then.

    Raises JournalError, which names the other process, if one has it open. The lock ends with the process, however it
    ends.
    """

    def __init__(self, path: Path) -> None:
        self._owner = path.with_suffix(".owner")
        self._file = self._locked(path)
        try:
            with suppress(OSError):  # only told to others
                self._owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
            self.entries = self._recover()
        except BaseException:
            self.close()
            raise

    def _locked(self, path: Path) -> FileIO:
        """The file, locked. If another process has removed it meanwhile, it is opened anew."""
        while True:
            file = FileIO(path, "a+")  # unbuffered: nothing is left to write when it is closed
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise JournalError(
                    f"Another alphaq is at work on {path.parent}{self._other()}. Wait for it to end, or stop it."
                ) from None
            except OSError:
                pass  # some network file systems have no locks either
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()

    def _other(self) -> str:
        try:
            return f" ({self._owner.read_text(encoding='utf-8')[:200]})"
        except (OSError, ValueError):
            return ""

    def _recover(self) -> list[JsonObject]:
        self._file.seek(0)
        entries: list[JsonObject] = []
        good = 0
        for line in self._file.readall().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
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

    def append(self, entry: JsonObject) -> None:
        """Add an object; it survives this process from here on."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        while line:  # a disk that is nearly full takes a part, and refuses the next
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Release the lock."""
        if not self._file.closed:
            with suppress(OSError):
                self._owner.unlink()
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
