"""How fast this machine reads memory, and what was measured of it and kept.

All cores read an array far larger than their caches; the best of several times counts, since others only disturb.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alphaq.checkpoint.files import memory_bytes
from alphaq.checkpoint.writer import atomic_file
from alphaq.errors import AlphaQError
from alphaq.nouns.rates import Rates
from alphaq.work.cores import available_cores
from alphaq.work.timing import seconds

MOST_BYTES = 2**29
ROUNDS = 5


class Bandwidth(BaseModel):
    """Bytes per second that `threads` threads of a machine read, and the rates of engines that were measured on it, in
    the versions that they had."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    threads: int = Field(gt=0)
    bytes_per_second: int = Field(gt=0)
    engines: dict[str, Rates] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


def machine_name() -> str:
    """The machine in words, as far as that says something of its memory."""
    return f"{platform.node()}, {platform.processor() or platform.machine()}, {available_cores()} cores"


def measured_bandwidth(threads: int | None = None, nbytes: int | None = None) -> Bandwidth:
    """Read an array of `nbytes` on so many threads; all cores and an eighth of the memory at most by default.

    Raises AlphaQError where there is no memory for it.
    """
    threads = threads or available_cores()
    nbytes = min(MOST_BYTES, (memory_bytes() or 8 * MOST_BYTES) // 8) if nbytes is None else nbytes
    count = nbytes // 4 // threads
    if count < 1:
        raise AlphaQError(f"{nbytes:,} bytes are too little memory to measure with. State --bandwidth 80GB/s instead.")
    parts = [np.ones(count, np.float32) for _ in range(threads)]  # touched here: pages of zeros are all one page
    with ThreadPoolExecutor(threads) as pool:  # numpy looks for the largest with vectors, and without the lock
        best = min(seconds(lambda: list(pool.map(np.max, parts))) for _ in range(ROUNDS))
    return Bandwidth(machine=machine_name(), threads=threads, bytes_per_second=math.floor(threads * count * 4 / best))


def kept_bandwidth(folder: Path) -> Bandwidth | None:
    """What was measured of this machine before; None if nothing was, or the file is damaged."""
    try:
        return Bandwidth.model_validate_json(_file(folder).read_bytes())
    except (OSError, ValidationError):
        return None


def bandwidth_here(folder: Path, again: bool = False) -> Bandwidth:
    """This machine's, as kept in a folder, or measured and kept there."""
    known = None if again else kept_bandwidth(folder)
    if known is not None:
        return known
    found = measured_bandwidth()
    keep_bandwidth(folder, found)
    return found


def keep_bandwidth(folder: Path, found: Bandwidth) -> None:
    """Write down what was measured of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(_file(folder)) as unfinished:
        unfinished.write_text(json.dumps(found.model_dump(), indent=1) + "\n", encoding="utf-8")


def _file(folder: Path) -> Path:
    return folder / f"bandwidth-{hashlib.sha256(machine_name().encode()).hexdigest()[:16]}.json"
