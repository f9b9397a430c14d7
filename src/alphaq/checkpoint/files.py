"""Read byte ranges of large files. Nothing is mapped, so memory is what the caller holds and no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from alphaq.errors import CheckpointError

CHUNK_BYTES = 8 << 20


class PlainFile:
    """A file opened for reading at any place, from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, begin: int, nbytes: int) -> torch.Tensor:
        """Bytes [begin, begin + nbytes) as uint8. Raises CheckpointError if the file is shorter."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        self.read_into(begin, memoryview(data.numpy()))  # type: ignore[arg-type]
        return data

    def read_into(self, begin: int, data: memoryview) -> None:
        """Fill a buffer with the bytes from `begin` on. Raises CheckpointError if the file is shorter."""
        done = 0
        while done < len(data):
            try:
                count = os.preadv(self._descriptor, [data[done:]], begin + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}. Check the disk.") from error
            if count == 0:
                raise CheckpointError(f"{self.path} was cut short while it was read. Restore the file.")
            done += count

    def chunks(self, begin: int, nbytes: int) -> Iterator[memoryview]:
        """The same bytes piece by piece, in one buffer that is used again."""
        buffer = memoryview(bytearray(min(nbytes, CHUNK_BYTES)))
        for offset in range(0, nbytes, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, nbytes - offset)]
            self.read_into(begin + offset, piece)
            yield piece

    def advise(self, begin: int, nbytes: int, advice: str) -> None:
        """Pass WILLNEED or DONTNEED on to the system; nbytes 0 means to the end. A no-op where there is none."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, begin, nbytes, getattr(os, f"POSIX_FADV_{advice}"))


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
