"""Write folders that appear complete or not at all, and shards whose sizes were known beforehand."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from alphaq.checkpoint.files import PlainFile, Stamp, reading
from alphaq.errors import OutputError, QuantizationError, VerificationError
from alphaq.work.journal import Journal

JOURNAL_NAME = "journal.jsonl"
UNFINISHED_NAME = "files"
"""What is to become the output, inside the folder of an unfinished run."""


def check_absent(out: Path) -> None:
    """Raise OutputError if `out` exists, or nothing can be put there."""
    if os.path.lexists(out):
        raise OutputError(f"{out} already exists. Remove it or choose another output.")
    _check_parent(out)


def check_file(out: Path) -> None:
    """Raise OutputError if a file cannot be put at `out`: it is a folder, or its parent is none."""
    if out.is_dir():
        raise OutputError(f"{out} is a folder. Name a file instead.")
    _check_parent(out)


def _check_parent(out: Path) -> None:
    if re.match(r"[a-z][a-z0-9+.\-]+:/", str(out), re.IGNORECASE):
        raise OutputError(
            f"{out} is an address. Only `alphaq quantize -o` writes to one; name a folder of this machine."
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder. Create it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written to. Choose another output, or change its permissions.")


def _beside(out: Path) -> Path:
    """A temporary name beside `out` for this process; what killed ones have left is removed."""
    folder, stem = out.absolute().parent, f".{out.name}.partial-{platform.node()}-"
    for left in folder.glob(f"{glob.escape(stem)}*"):
        owner = left.name.removeprefix(stem)
        if owner.isdecimal() and not _is_running(int(owner)):
            _remove(left)
    return folder / f"{stem}{os.getpid()}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes otherwise."""
    check_absent(out)
    partial = _beside(out)
    try:
        partial.mkdir()
        yield partial
        _sync_all(partial)
        _publish(partial, out)
    except OSError as error:
        raise _refused(out, error) from error
    finally:
        _remove(partial)


@contextmanager
def resumable_folder(out: Path, job: Mapping[str, str], restart: bool = False) -> Iterator[tuple[Path, Journal]]:
    """Like `atomic_folder`, but what an interrupted run has written stays, with its journal, for the next one.

    job: what the output depends on. Raises OutputError if an unfinished run of another job is there, unless told to
    `restart`. A matrix that cannot be quantized removes the folder: nothing in it can be of use. After a failed
    verification, or where the disk has refused what was written, the next run makes everything anew.
    """
    check_absent(out)
    partial = out.absolute().parent / f".{out.name}.partial"
    folder = partial / UNFINISHED_NAME
    try:
        partial.mkdir(exist_ok=True)
        with Journal(partial / JOURNAL_NAME) as lines:
            check_absent(out)  # by a run that has just ended
            if restart or not lines.entries:
                lines.clear()
                if folder.exists():
                    shutil.rmtree(folder)
                lines.append({"job": dict(job)})
            folder.mkdir(exist_ok=True)
            earlier = lines.entries[0].get("job", {}) if lines.entries else job
            if changed := [key for key in job if earlier.get(key) != job[key]]:
                raise OutputError(
                    f"An unfinished run of {out} is there, but its {' and '.join(changed)} changed since. "
                    "Repeat the earlier command to finish it, or add --restart to discard it."
                )
            try:
                yield folder, lines
            except QuantizationError:
                shutil.rmtree(partial)
                raise
            except VerificationError:
                lines.clear()
                raise
            try:
                _sync_all(folder)
            except OSError:
                lines.clear()  # it would still read well from memory
                raise
            _publish(folder, out)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"Cannot write {out}: {error.strerror or error}. Free space and repeat the command, or choose another "
            "output."
        ) from error


@contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """A temporary path beside `out` that replaces it when the block ends well, and vanishes otherwise."""
    check_file(out)
    partial = _beside(out)
    try:
        yield partial
        _sync(partial)
        partial.replace(out)
        _sync(out.absolute().parent)
    except OSError as error:
        raise _refused(out, error) from error
    finally:
        _remove(partial)


def _refused(out: Path, error: OSError) -> OutputError:
    """What to tell of an output that the system does not let be written."""
    return OutputError(f"Cannot write {out}: {error.strerror or error}. Free space or choose another output.")


def _publish(folder: Path, out: Path) -> None:
    """Give a folder that is wholly on the disk its final name."""
    check_absent(out)
    folder.rename(out)
    _sync(out.absolute().parent)


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


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


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file in an output folder."""

    file: str
    begin: int
    nbytes: int


def create_file(path: Path, header: bytes, nbytes: int) -> None:
    """Write a file's header and reserve its size; one of that size that is there already keeps its data.

    The space is taken at once where the system can do so: a disk too small is told before the work, not after it.
    """
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(header)
        file.truncate(nbytes)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot
                    raise


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


def copy_file(source: Path, path: Path) -> None:
    """Copy a file. Raises CheckpointError if it cannot be read, or changes meanwhile."""
    with reading(source):
        stamp = Stamp.of(source.stat())
    with path.open("wb") as file:
        for piece in PlainFile(source, stamp).chunks(0, stamp.nbytes):
            file.write(piece)


def pieces_at(folder: Path, places: Iterable[Place]) -> Iterator[memoryview]:
    """The bytes at the places in turn, in a buffer that is used again."""
    for place in places:
        yield from PlainFile(folder / place.file).chunks(place.begin, place.nbytes)
