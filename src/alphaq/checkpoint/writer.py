"""Write a folder that appears complete or not at all, and shards whose sizes were known beforehand."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from alphaq.checkpoint.safetensors_format import DTYPE_NAMES, TensorSpec, layout
from alphaq.errors import OutputError


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


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes as they are stored."""
    flat = tensor.detach().contiguous().view(-1)
    return memoryview((flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)).numpy())  # type: ignore[arg-type]


def checksum(data: memoryview) -> str:
    """BLAKE2b, 128 bits, hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class ShardWriter:
    """One safetensors file: the header first, then each tensor at its own place, in any order."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, self._places, self.nbytes = layout(specs)
        self._missing = set(specs)
        self._file = path.open("wb")
        self._file.write(header)
        self._file.truncate(self.nbytes)

    def write(self, name: str, tensor: torch.Tensor) -> str:
        """Write one tensor; returns its checksum. The dtype and shape must be the declared ones."""
        place = self._places[name]
        if (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (place.dtype, place.shape):
            raise OutputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} but {place.dtype} {list(place.shape)} was declared. "
                "This is a defect of alphaq: please report it."
            )
        data = raw_bytes(tensor)
        self._file.seek(place.begin)
        self._file.write(data)
        self._missing.discard(name)
        return checksum(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise OutputError(f"{len(self._missing)} declared tensors were never written, e.g. {min(self._missing)}.")
