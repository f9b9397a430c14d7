"""Checkpoints on object stores: exactly the bytes that are needed, in ranges, through fsspec.

An address comes from the user's command line alone; nothing that a checkpoint says is ever made into one, apart from
the names of shards, which are checked like those of a local folder. Credentials come from the environment of
whoever reads, and never travel with a checkpoint.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from alphaq.checkpoint.files import SourceFile, Stamp, changed
from alphaq.checkpoint.side_files import MOST_SIDE_FILES, References, is_small
from alphaq.errors import AlphaQError, CheckpointError, MissingExtraError, first_line
from alphaq.work.untrusted import MAX_JSON_BYTES, shown

S = TypeVar("S")
T = TypeVar("T")
PART_BYTES = 8 << 20  # of one request; a larger range is several requests at once
CONNECTIONS = 8
MOST_LEVELS = 4  # of folders that are looked into for small files
_VERSIONS = (
    "ETag",
    "etag",
    "generation",
    "xet_hash",
    "blob_id",
    "md5Hash",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
)
"""What stores call that which tells a file's contents from others', the best first."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def is_url(text: str | Path) -> bool:
    """Whether a user's text is an address rather than a path."""
    return re.match(r"[a-z][a-z0-9+.\-]+://", str(text), re.IGNORECASE) is not None


def local_path(url: str) -> Path | None:
    """The path that a `file://` address means, None for another kind. Raises AlphaQError if it names a machine."""
    parts = urlsplit(url)
    if parts.scheme.lower() != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise AlphaQError(f"{url} names the machine {parts.netloc}. Write file:///path for a file of this one.")
    return Path(unquote(parts.path))


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Tell what a store refuses meanwhile as a CheckpointError, whatever kind of error its client raises."""
    try:
        yield
    except AlphaQError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{url} is not there. Check the address.") from None
    except Exception as error:  # clients of stores have hierarchies of their own
        if type(error).__name__ == "FileExpired":
            raise changed(url) from None
        raise CheckpointError(
            f"{url} cannot be read ({first_line(error)}). Check the address, the credentials and the network."
        ) from error


@dataclass(frozen=True)
class Store:
    """A folder on an object store."""

    url: str
    scratch: TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)
    """Where its small files were copied to, as long as this object lives."""

    @classmethod
    def of(cls, url: str) -> Store:
        """The folder at an address. Raises AlphaQError for one that cannot be, MissingExtraError."""
        if "::" in url:
            raise AlphaQError(f"{url} chains addresses. Give a plain one, such as s3://bucket/folder.")
        store = cls(url.rstrip("/"))
        _ = store.system
        return store

    def __getstate__(self) -> dict[str, object]:
        return {"url": self.url, "scratch": None}  # another process opens its own, with its own credentials

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        scheme = self.url.partition("://")[0].lower()
        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            if scheme in _EXTRAS:
                raise MissingExtraError(_EXTRAS[scheme], f"{scheme}:// needs a package of its own") from None
            raise AlphaQError(f"{self.url} cannot be opened: {error}.") from None
        except ValueError as error:
            raise AlphaQError(
                f"{self.url} cannot be opened ({error}). Known: s3://, gs://, hf://, https://, file://."
            ) from None
        return system, path.rstrip("/")

    @property
    def system(self) -> Any:
        """fsspec's file system."""
        return self._opened[0]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.rpartition("/")[2] or self.path

    @property
    def path(self) -> str:
        """The folder, as the file system calls it."""
        return self._opened[1]

    def at(self, name: str) -> str:
        """A file of the folder, as the file system calls it."""
        return f"{self.path}/{name}"

    def stamps(self) -> dict[str, Stamp]:
        """The files that lie in the folder now, by name."""
        with asking(self.url):
            return self.listing()

    def listing(self) -> dict[str, Stamp]:
        """`stamps` with the store's own errors."""
        self.system.invalidate_cache()
        files = {name: info for name, info in self._entries().items() if info.get("type") == "file"}
        silent = [name for name, info in files.items() if info.get("size") is None]  # web servers list names alone
        files.update(zip(silent, self.map(silent, lambda name: self.system.info(self.at(name))), strict=True))
        return {name: stamp_of(info) for name, info in files.items()}

    def _entries(self) -> dict[str, Mapping[str, Any]]:
        """What lies in the folder, folders too."""
        entries = {}
        for info in self.system.ls(self.path, detail=True):
            parent, _, name = str(info["name"]).rstrip("/").rpartition("/")
            if parent == self.path.lstrip("/") and name not in ("", ".", ".."):
                entries[name] = info
        return entries

    def listing_below(self, top: str = "") -> dict[str, Stamp]:
        """The files under the folder or one of its own, by their names relative to the former."""
        start = f"{self.path}/".lstrip("/")
        entries = self.system.find(self.at(top).rstrip("/"), maxdepth=MOST_LEVELS if top else None, detail=True)
        names = {str(name).lstrip("/").removeprefix(start): info for name, info in entries.items()}
        return {name: stamp_of(info) for name, info in names.items() if name.startswith(top)}

    def download(self, stamps: Mapping[str, Stamp]) -> Store:
        """The store with its small files copied to a folder that lives as long as it."""
        scratch = TemporaryDirectory(prefix="alphaq-")
        folder = Path(scratch.name) / self.name
        folder.mkdir()
        self._copy({name: stamps[name] for name in stamps if is_small(name)}, folder)
        with asking(self.url):
            wanted = References.of(folder, self._entries())
            below = {name: stamp for top in wanted.tops() for name, stamp in self.listing_below(top).items()}
        self._copy({name: below[name] for name in wanted.among(below)}, folder)
        kept = Store(self.url, scratch)
        kept.__dict__["_opened"] = self._opened
        return kept

    def _copy(self, stamps: Mapping[str, Stamp], folder: Path) -> None:
        """Copy small files to a local folder."""
        for name, stamp in stamps.items():
            if "\\" in name or not name.isprintable() or not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise CheckpointError(f"{self.url} holds a file named {shown(name)}. Remove or rename it.")
            if stamp.nbytes > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{self.url}/{name} has {stamp.nbytes} bytes, more than the {MAX_JSON_BYTES} that a small "
                    "file beside a model may have. Move it out of the folder."
                )
        if len(stamps) > MOST_SIDE_FILES:
            raise CheckpointError(f"{self.url} holds {len(stamps)} small files, more than {MOST_SIDE_FILES}.")

        def fetch(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.file(name, stamps[name]).read(0, stamps[name].nbytes).numpy().data)

        for _ in self.map(sorted(stamps), fetch):
            pass

    def map(self, items: Iterable[S], ask: Callable[[S], T]) -> Iterator[T]:
        """ask(item) for each, several at the same time, since a request waits far longer than it works; in order."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            yield from pool.map(ask, items)

    @property
    def folder(self) -> Path:
        """Where the small files were copied to."""
        if self.scratch is None:
            raise CheckpointError(f"The small files of {self.url} are on the machine that opened it alone.")
        return Path(self.scratch.name) / self.name

    def file(self, name: str, stamp: Stamp) -> SourceFile:
        """A file of the folder, to read from."""
        return RemoteFile(self, name, stamp)


def stamp_of(info: Mapping[str, Any]) -> Stamp:
    """Size and version in what a file system says of a file."""
    version = next((info[key] for key in _VERSIONS if info.get(key) is not None), "")
    return Stamp(int(info.get("size") or 0), str(version).strip('"'))


class RemoteFile(SourceFile):
    """A file of a store. Each range is asked for once, large ones in parts at the same time.

    Raises CheckpointError if the file's version is not the one of its stamp: when a process first reads it, and with
    every range where the store can be asked for a version (S3 can).
    """

    chunk_bytes = CONNECTIONS * PART_BYTES // 2

    def __init__(self, store: Store, name: str, stamp: Stamp) -> None:
        self.store, self.name, self.stamp = store, name, stamp
        self.url = f"{store.url}/{name}"
        self._free: list[Any] = []
        self._lock = threading.Lock()

    def read_into(self, begin: int, data: memoryview) -> None:
        """Fill a buffer with the bytes from `begin` on."""
        if begin + len(data) > self.stamp.nbytes:
            raise CheckpointError(f"{self.url} has {self.stamp.nbytes} bytes, fewer than are to be read.")
        parts = [(begin + at, data[at : at + PART_BYTES]) for at in range(0, len(data), PART_BYTES)]
        if len(parts) == 1:
            self._read_part(*parts[0])
        elif parts:
            list(_pool().map(lambda part: self._read_part(*part), parts))

    def _read_part(self, begin: int, data: memoryview) -> None:
        with asking(self.url):
            handle = self._handle()
            handle.seek(begin)
            done = 0
            while done < len(data):
                piece = handle.read(len(data) - done)
                if not piece:
                    raise CheckpointError(f"{self.url} was cut short while it was read. Restore the file.")
                data[done : done + len(piece)] = piece
                done += len(piece)
            with self._lock:
                self._free.append(handle)

    def _handle(self) -> Any:
        """An open file that no other thread uses; the first of them sees that the file is still the same."""
        with self._lock:
            if self._free:
                return self._free.pop()
        system, path = self.store.system, self.store.at(self.name)
        if stamp_of(system.info(path)) != self.stamp:
            raise changed(self.url)
        return system.open(path, "rb", cache_type="none")

    def forget(self) -> None:
        """Drop the open files."""
        with self._lock:
            self._free.clear()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="alphaq-store")
