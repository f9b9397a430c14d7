"""Write folders that appear complete or not at all, and shards whose sizes were known beforehand."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alphaq.checkpoint.files import PlainFile
from alphaq.errors import OutputError, QuantizationError
from alphaq.journal import Journal

JOURNAL_NAME = "journal.jsonl"


def check_absent(out: Path) -> None:
    """Raise OutputError if `out` exists or its parent does not."""
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} already exists. Remove it or choose another output.")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out.absolute().parent} is not a folder. Create it first.")


def check_file(out: Path) -> None:
    """Raise OutputError if a file cannot be put at `out`: it is a folder, or its parent is none."""
    if out.is_dir():
        raise OutputError(f"{out} is a folder. Name a file instead.")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out.absolute().parent} is not a folder. Create it first.")


def _remove_abandoned(out: Path) -> None:
    """Remove temporary folders of `out` whose process was killed before it could do so itself."""
    for partial in out.absolute().parent.glob(f".{glob.escape(out.name)}.partial-*"):
        owner = partial.name.rpartition("-")[2]
        if owner.isdecimal() and not _is_running(int(owner)):
            shutil.rmtree(partial, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes otherwise."""
    check_absent(out)
    _remove_abandoned(out)
    partial = out.absolute().parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        check_absent(out)
        partial.rename(out)
        _sync(out.absolute().parent)
    except OSError as error:
        raise OutputError(
            f"Cannot write {out}: {error.strerror or error}. Free space or choose another output."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumable_folder(out: Path, job: Mapping[str, str], restart: bool = False) -> Iterator[tuple[Path, Journal]]:
    """Like `atomic_folder`, but what an interrupted run has written stays, with its journal, for the next one.

    job: what the output depends on. Raises OutputError if an unfinished run of another job is there,
    unless told to `restart`. A matrix that cannot be
    quantized removes the folder: nothing in it can be of use.
    """
    check_absent(out)
    partial = out.absolute().parent / f".{out.name}.partial"
    journal = partial / JOURNAL_NAME
    try:
        partial.mkdir(exist_ok=True)
        with Journal(journal) as lines:
            if restart and lines.entries:
                lines.clear()
            if not lines.entries:
                for path in partial.iterdir():
                    if path != journal:
                        path.unlink()
                lines.append({"job": dict(job)})
            earlier = lines.entries[0].get("job", {}) if lines.entries else job
            if changed := [key for key in job if earlier.get(key) != job[key]]:
                raise OutputError(
                    f"An unfinished run of {out} is there, but its {' and '.join(changed)} changed since. "
                    "Repeat the earlier command to finish it, or add --restart to discard it."
                )
            try:
                yield partial, lines
            except QuantizationError:
                shutil.rmtree(partial)
                raise
            for path in [*partial.iterdir(), partial]:
                _sync(path)
            check_absent(out)
            partial.rename(out)
            (out / JOURNAL_NAME).unlink()
        _sync(out.absolute().parent)
    except OSError as error:
        raise OutputError(
            f"Cannot write {out}: {error.strerror or error}. Free space and repeat the command, or choose another "
            "output."
        ) from error


@contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """A temporary path beside `out` that replaces it when the block ends well, and vanishes otherwise."""
    check_file(out)
    partial = out.absolute().parent / f".{out.name}.partial-{os.getpid()}"
    try:
        yield partial
        _sync(partial)
        partial.replace(out)
    except OSError as error:
        raise OutputError(
            f"Cannot write {out}: {error.strerror or error}. Free space or choose another output."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(pieces: Iterable[memoryview]) -> str:
    """BLAKE2b of the pieces in turn, 128 bits, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Place:
    """Bytes of a file in an output folder."""

    file: str
    begin: int
    nbytes: int


def create_file(path: Path, header: bytes, nbytes: int) -> None:
    """Write a file's header and reserve its size; one of that size that is there already keeps its data."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(header)
        file.truncate(nbytes)


def write_at(folder: Path, places: Iterable[Place], pieces: Iterable[memoryview]) -> str:
    """Fill places in files that exist, one after the other, with bytes that come in any pieces; returns their checksum.

    Raises OutputError unless they fill the places exactly.
    """
    digest = hashlib.blake2b(digest_size=16)
    waiting = iter(pieces)
    piece = memoryview(b"")
    for place in places:
        with (folder / place.file).open("r+b") as file:
            file.seek(place.begin)
            left = place.nbytes
            while left:
                while not len(piece):
                    try:
                        piece = next(waiting)
                    except StopIteration:
                        raise OutputError(f"{place.file} lacks {left} bytes of what it was laid out for.") from None
                file.write(piece[:left])
                digest.update(piece[:left])
                piece, left = piece[left:], left - len(piece[:left])
    if len(piece) or any(map(len, waiting)):
        raise OutputError(f"{folder} has no place for all of an entry's bytes.")
    return digest.hexdigest()


def pieces_at(folder: Path, places: Iterable[Place]) -> Iterator[memoryview]:
    """The bytes at the places in turn, in a buffer that is used again."""
    for place in places:
        yield from PlainFile(folder / place.file).chunks(place.begin, place.nbytes)
