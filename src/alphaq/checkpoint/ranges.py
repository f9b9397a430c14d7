"""Which bytes of a checkpoint are read for a matrix or a tensor, and what was read of a store, kept on this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from alphaq.checkpoint.encoded.reading import stored_rows
from alphaq.checkpoint.files import SourceFile, Stamp
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.remote import Store
from alphaq.checkpoint.tensors import rows_place
from alphaq.errors import JournalError
from alphaq.nouns.matrix import MatrixRef

DIGEST_BYTES = 16


class Range(NamedTuple):
    """Bytes [begin, begin + nbytes) of a weight file."""

    shard: str
    begin: int
    nbytes: int


def ranges_of(checkpoint: Checkpoint, matrix: MatrixRef) -> Iterator[Range]:
    """What is read for a matrix: its rows, and the scales that they need."""
    shard, info = checkpoint.shard_of[matrix.tensor], checkpoint.info(matrix.tensor)
    if info.encoding is not None and info.encoding.decoder is not None:
        yield Range(shard, info.begin, info.nbytes)
        return
    yield Range(shard, *checkpoint.place(matrix))
    for _, part in info.encoding.parts if info.encoding is not None else ():
        needed = part.rows(*stored_rows(info, matrix))
        yield Range(part.shard, *rows_place(part.info, part.slice_of(matrix.index or 0), *needed))


def ranges_of_tensor(checkpoint: Checkpoint, name: str) -> Iterator[Range]:
    """What is read for a whole tensor that is no stack of encoded matrices."""
    info = checkpoint.info(name)
    yield Range(checkpoint.shard_of[name], info.begin, info.nbytes)
    for _, part in info.encoding.parts if info.encoding is not None else ():
        yield Range(part.shard, part.info.begin, part.info.nbytes)


def expect(checkpoint: Checkpoint, matrix: MatrixRef) -> None:
    """Tell the system that a matrix will be read soon."""
    for shard, begin, nbytes in ranges_of(checkpoint, matrix):
        checkpoint.file(shard).expect(begin, nbytes)


@dataclass(frozen=True)
class KeepingStore(Store):
    """A store of which every range that is read is kept in a folder, and read there from then on.

    kept: a folder for this version of the weights alone.
    """

    kept: Path = Path()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "kept": self.kept}

    def file(self, name: str, stamp: Stamp) -> SourceFile:
        """A file of the folder, to read from."""
        return _KeptFile(super().file(name, stamp), self.kept, name)


class _KeptFile(SourceFile):
    """A file whose ranges are kept one by one, each under its place: a killed run loses none."""

    def __init__(self, source: SourceFile, folder: Path, name: str) -> None:
        self.source, self.folder = source, folder
        self.chunk_bytes = source.chunk_bytes
        self.prefix = hashlib.sha256(name.encode()).hexdigest()[:16]

    def path(self, begin: int, nbytes: int) -> Path:
        return self.folder / f"{self.prefix}-{begin}-{nbytes}"

    def read_into(self, begin: int, data: memoryview) -> None:
        """Fill a buffer with the bytes from `begin` on."""
        path = self.path(begin, len(data))
        with suppress(OSError), path.open("rb") as file:
            if file.readinto(data) == len(data) and file.read() == _digest(data):
                return
        self.source.read_into(begin, data)
        unfinished = path.with_suffix(f".{os.getpid()}.partial")
        with _keeping(self.folder):
            with unfinished.open("wb") as file:
                file.write(data)
                file.write(_digest(data))
            unfinished.replace(path)

    def holds(self, begin: int, nbytes: int) -> bool:
        """Whether a range is kept, by its size; what is damaged is found and read anew later."""
        path = self.path(begin, nbytes)
        return path.is_file() and path.stat().st_size == nbytes + DIGEST_BYTES

    def forget(self) -> None:
        """Drop what the source has open."""
        self.source.forget()


@contextmanager
def _keeping(folder: Path) -> Iterator[None]:
    """Tell what the system refuses meanwhile as a JournalError: the store is sound, and what is kept of it is not."""
    try:
        yield
    except OSError as error:
        raise JournalError(
            f"What is read of a store cannot be kept in {folder} ({error.strerror or error}). Free space there, or set "
            "ALPHAQ_CACHE to another folder."
        ) from error


def _digest(data: memoryview) -> bytes:
    """What a kept range ends with, since a machine that fails may leave a file of the right size and other bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def keeping(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with what is read of its store kept in a folder; the same where it lies on this machine."""
    if checkpoint.store is None:
        return checkpoint
    store = KeepingStore(checkpoint.store.url, checkpoint.store.scratch, folder)
    store.__dict__["_opened"] = checkpoint.store._opened
    with _keeping(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return replace(checkpoint, store=store, _files={})


def missing(checkpoint: Checkpoint, wanted: Iterable[Range]) -> list[Range]:
    """Ranges that are still to be fetched, each once, as they lie; none where the checkpoint lies on this machine."""
    if not isinstance(checkpoint.store, KeepingStore):
        return []

    def lacks(one: Range) -> bool:
        file = checkpoint.file(one.shard)
        return not (isinstance(file, _KeptFile) and file.holds(one.begin, one.nbytes))

    return sorted(one for one in dict.fromkeys(wanted) if lacks(one))


def fetched(checkpoint: Checkpoint, wanted: Iterable[Range]) -> Iterator[int]:
    """Fetch ranges of a store, several at the same time; yields the bytes of each as it is there."""
    assert checkpoint.store is not None  # only those of a store are missing

    def fetch(one: Range) -> int:
        checkpoint.file(one.shard).read(one.begin, one.nbytes)
        return one.nbytes

    yield from checkpoint.store.map(wanted, fetch)
