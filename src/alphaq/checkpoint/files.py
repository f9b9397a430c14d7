"""Read files of checkpoints. Nothing is mapped, so memory is what the caller holds and no more."""

from __future__ import annotations

import codecs
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from alphaq.errors import CheckpointError
from alphaq.work.untrusted import JsonObject, open_regular, parse_json, read_bounded

CHUNK_BYTES = 8 << 20


class Stamp(NamedTuple):
    """What tells whether a file was written since: only ever compared for equality, so clocks may step."""

    nbytes: int
    version: int | str
    """When it was last written, in ns; on an object store its ETag or what stands for one."""

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp in what the system says of a file."""
        return cls(status.st_size, status.st_mtime_ns)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell what the system refuses meanwhile as a CheckpointError, of `path` unless the system names the file."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        absent = isinstance(error, FileNotFoundError)
        remedy = "Complete the download." if absent else "Check its permissions and the disk."
        raise CheckpointError(f"{where} cannot be read: {why}. {remedy}") from error


def open_file(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading. Raises CheckpointError."""
    with reading(path):
        return open_regular(path, buffering)


def is_file(path: Path) -> bool:
    """Whether a regular file is there; False for names that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def check_link(path: Path, folder: Path | None = None) -> None:
    """CheckpointError if a file is a link out of its folder, to where its author has nothing to do.

    folder: the model's, where the file lies below it. The hub's cache links `snapshots/REVISION/…` to `blobs`, and
    folders downloaded with links have links to there; any other way out is not followed.
    """
    home, target = Path(os.path.realpath(folder or path.parent)), Path(os.path.realpath(path))
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    inside = target.parent == home if folder is None else home in (target, *target.parents)
    if not inside and target.parent not in blobs and not _is_cached_blob(target):
        raise CheckpointError(
            f"{path} is a link out of its folder. Copy the file that it should be to its place: links are followed "
            "within the folder and into the hub's cache only."
        )


def _is_cached_blob(target: Path) -> bool:
    """Whether a file lies where the hub's client keeps what it downloaded: `models--ORG--NAME/blobs/HASH`."""
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")


def read_json(path: Path) -> JsonObject:
    """A JSON file's object. Raises CheckpointError naming the file."""
    check_link(path)
    with reading(path):
        raw = read_bounded(path)
    try:
        data = parse_json(raw)
    except ValueError as error:
        if raw.startswith(codecs.BOM_UTF8):
            raise CheckpointError(
                f"{path} begins with a byte-order mark, which transformers refuses too. Save it as UTF-8 without one."
            ) from None
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download it again.")
    return data


@contextmanager
def without_collecting() -> Iterator[None]:
    """Make many objects that all stay, without searches for garbage among them: they take a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class SourceFile:
    """Bytes that can be read at any place, from any thread."""

    chunk_bytes = CHUNK_BYTES

    def read(self, begin: int, nbytes: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Bytes [begin, begin + nbytes) as uint8, in `memory` where it is large enough, else in memory of their own.

        Raises CheckpointError if the file is shorter, or has changed.
        """
        if memory is not None and len(memory) >= nbytes:
            data = memory[:nbytes]
        else:
            data = torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # whatever device a caller makes the default
        self.read_into(begin, data.numpy().data)
        return data

    def read_into(self, begin: int, data: memoryview) -> None:
        """Fill a buffer with the bytes from `begin` on. Raises CheckpointError as `read` does."""
        raise NotImplementedError

    def chunks(self, begin: int, nbytes: int) -> Iterator[memoryview]:
        """The same bytes piece by piece, in one buffer that is used again."""
        buffer = memoryview(bytearray(min(nbytes, self.chunk_bytes)))
        for offset in range(0, nbytes, self.chunk_bytes):
            piece = buffer[: min(self.chunk_bytes, nbytes - offset)]
            self.read_into(begin + offset, piece)
            yield piece

    def expect(self, begin: int, nbytes: int) -> None:
        """Tell the system that these bytes will be read soon, where there is a way to."""

    def forget(self) -> None:
        """Tell the system to drop the file from its cache, where there is a way to."""


class PlainFile(SourceFile):
    """A local file. stamp: what it must have, where it must not change."""

    def __init__(self, path: Path, stamp: Stamp | None = None) -> None:
        self.path = path
        self.stamp = stamp
        self._file = open_file(path, buffering=0)
        self._lock = threading.Lock()

    def read_into(self, begin: int, data: memoryview) -> None:
        """Fill a buffer with the bytes from `begin` on. Raises CheckpointError as `read` does."""
        done = 0
        with self._lock, reading(self.path):
            self._file.seek(begin)
            while done < len(data):
                count = self._file.readinto(data[done:])  # type: ignore[attr-defined]
                if not count:
                    raise CheckpointError(f"{self.path} was cut short while it was read. Restore the file.")
                done += count
            if self.stamp is not None and Stamp.of(os.fstat(self._file.fileno())) != self.stamp:
                raise changed(self.path)

    def expect(self, begin: int, nbytes: int) -> None:
        """Tell the system that these bytes will be read soon, where there is a way to."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), begin, nbytes, os.POSIX_FADV_WILLNEED)

    def forget(self) -> None:
        """Tell the system to drop the file from its cache, where there is a way to."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def changed(path: Path | str) -> CheckpointError:
    """That a source has other bytes than when its run began."""
    return CheckpointError(f"{path} was changed while it was read. Wait until it is complete, and repeat the command.")


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or less under a limit; 0 where the system does not tell."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return min((limit for limit in (machine, _limit_of_process(), _limit_of_group()) if limit), default=0)


def free_bytes() -> int:
    """What of that memory nobody holds now, caches not counted; 0 where the system does not tell."""
    free = _number_in(Path("/proc/meminfo"), "MemAvailable:") * 1024
    held = (max(1, limit - used) for limit, used in map(_limit_and_use, _groups()) if limit)
    return min(free, _limit_of_process() or free, *held)


def _number_in(path: Path, key: str) -> int:
    """The number that follows a key at the start of a line; 0 without one."""
    with suppress(OSError, ValueError, IndexError):
        lines = path.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}")), 0)
    return 0


def _limit_and_use(group: Path) -> tuple[int, int]:
    """Bytes that a control group may hold and holds, without files that the system would drop; 0 for no limit."""
    for limit, use, files in (
        ("memory.max", "memory.current", "inactive_file "),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    ):
        with suppress(OSError, ValueError):  # "max" is no number
            most, held = (int((group / name).read_text(encoding="utf-8")) for name in (limit, use))
            return most, held - _number_in(group / "memory.stat", files)
    return 0, 0


def _limit_of_process() -> int:
    """Of what it has for itself (`ulimit -d`, `ulimit -v`); 0 for none."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=0)


@lru_cache(maxsize=1)
def _limit_of_group() -> int:
    """Of the container or control group that it runs in; 0 for none."""
    found = []
    for group in _groups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max" is no number
                found.append(int((group / name).read_text(encoding="utf-8")))
    return min(found, default=0)


def _groups() -> list[Path]:
    """The control groups that this process is in, its own first; of the old kind the root."""
    own = ""
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    root = Path("/sys/fs/cgroup")
    return [root / part for part in (Path(own), *Path(own).parents)] + [root / "memory"]
