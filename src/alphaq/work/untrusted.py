"""Read what strangers wrote: regular files only, within bounds, and JSON that means one thing."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from alphaq.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # ten times the index of a model of a hundred thousand tensors
MAX_JSON_VALUES = 5_000_000  # small values take far more memory than text
MAX_JSON_DEPTH = 50
MANY_KEYS = 100
"""From here on texts are kept once: an index and its files' headers have the same half million names."""
SHOWN_CHARACTERS = 80
POINTER_BEGIN = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1023  # of the specification: a pointer is smaller than 1024 bytes

JsonObject = dict[str, Any]
"""What a stranger's JSON or metadata says, values unchecked: a config, say. What is ours is a record."""

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys instead of showing them, changes of the writing direction included."""


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a file for reading. Raises OSError, also for pipes and devices, which may have no end.

    Raises CheckpointError for what git leaves in place of a large file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    file = path.open("rb", buffering=buffering)
    if status.st_size <= MAX_POINTER_BYTES:
        if file.read(len(POINTER_BEGIN)) == POINTER_BEGIN:
            file.close()
            raise pointer(path)
        file.seek(0)
    return file


def pointer(path: Path | str) -> CheckpointError:
    """That a file was not fetched."""
    return CheckpointError(f"{path} is a Git LFS pointer, not the file. Run `git lfs pull` in the folder.")


def read_bounded(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a file. Raises OSError, also if there are more than `most`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, most) + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return data


def parse_json(raw: str | bytes, strict: bool = False) -> Any:
    """What a JSON text says. strict: all numbers are finite and all text can be shown.

    Raises ValueError for what is no JSON in UTF-8, for a key that appears twice, unpaired surrogates, and for more or
    deeper values than there is memory for.
    """
    text = raw.decode() if isinstance(raw, bytes) else raw
    if sum(map(text.count, ",[{")) > MAX_JSON_VALUES:
        raise ValueError(f"it has more than {MAX_JSON_VALUES} values")
    number = _finite if strict else None
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=number, parse_float=number)
    except RecursionError:
        raise _too_deep() from None
    level: list[Any] = [[data]]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for value in level for inner in _inside(value, strict) if isinstance(inner, (dict, list))]
        if not level:
            break
    else:
        raise _too_deep()
    if _ESCAPED_SURROGATE.search(text):
        json.dumps(data, ensure_ascii=False).encode()
    return data


def shown(text: object) -> str:
    """The beginning of what strangers wrote, in quotes and without control characters."""
    whole = str(text)
    return repr(whole if len(whole) <= SHOWN_CHARACTERS else f"{whole[:SHOWN_CHARACTERS]}…")


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    if len(pairs) > MANY_KEYS:
        keys = {sys.intern(key): sys.intern(value) if type(value) is str else value for key, value in pairs}
    else:
        keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} appears twice")
    return keys


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{shown(number)} is not a finite number")
    return value


def _inside(value: JsonObject | list[Any], strict: bool) -> Collection[Any]:
    """What a container holds; ValueError for text that cannot be shown, if that matters."""
    inner = value.values() if isinstance(value, dict) else value
    if strict:
        for text in (*value, *inner):
            if isinstance(text, str) and _CONTROL.search(text):
                raise ValueError(f"the text {shown(text)} has control characters")
    return inner


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
