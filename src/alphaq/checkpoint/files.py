"""Read byte ranges of large files. Nothing is mapped, so memory is what the caller holds and no more."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from alphaq.errors import CheckpointError

CHUNK_BYTES = 8 << 20


class PlainFile:
    """A file opened for reading at any place, from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def read(self, begin: int, nbytes: int) -> torch.Tensor:
        """Bytes [begin, begin + nbytes) as uint8. Raises CheckpointError if the file is shorter."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        self.read_into(begin, data.numpy().data)
        return data

    def read_into(self, begin: int, data: memoryview) -> None:
        """Fill a buffer with the bytes from `begin` on. Raises CheckpointError if the file is shorter."""
        done = 0
        with self._lock:
            try:
                self._file.seek(begin)
                while done < len(data):
                    count = self._file.readinto(data[done:])
                    if not count:
                        raise CheckpointError(f"{self.path} was cut short while it was read. Restore the file.")
                    done += count
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}. Check the disk.") from error

    def chunks(self, begin: int, nbytes: int) -> Iterator[memoryview]:
        """The same bytes piece by piece, in one buffer that is used again."""
        buffer = memoryview(bytearray(min(nbytes, CHUNK_BYTES)))
        for offset in range(0, nbytes, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, nbytes - offset)]
            self.read_into(begin + offset, piece)
            yield piece

    def expect(self, begin: int, nbytes: int) -> None:
        """Tell the system that these bytes will be read soon, where there is a way to."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), begin, nbytes, os.POSIX_FADV_WILLNEED)

    def forget(self) -> None:
        """Tell the system to drop the file from its cache, where there is a way to."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_bytes() -> int:
    """Physical memory of this machine; 0 where the system does not tell."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
