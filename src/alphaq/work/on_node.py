"""What a process on a node of a cluster runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from alphaq import __version__
from alphaq.errors import AlphaQError

S = TypeVar("S")
T = TypeVar("T")


def own_version() -> str:
    """What a driver and its nodes must have alike."""
    major, minor, _ = platform.python_version_tuple()
    return f"alphaq {__version__}, python {major}.{minor}"


_shared: dict[str, object] = {}


def _shared_of(boxed: Sequence[Any]) -> Any:
    """What all tasks share, fetched and unpacked once by a process. Boxed, so that Ray does not do so for each task."""
    import ray

    key = boxed[0].hex()
    if key not in _shared:
        import torch

        torch.set_num_threads(1)
        _shared.clear()
        _shared[key] = ray.get(boxed[0])
    return _shared[key]


def run_batch(boxed: Sequence[Any], function: Callable[[Any, S], T], tasks: Sequence[S]) -> tuple[Any, list[T]]:
    """Results up to the first task that fails, and what that raised, if it is the input's or the system's fault."""
    shared = _shared_of(boxed)
    results: list[T] = []
    try:
        for task in tasks:
            results.append(function(shared, task))
    except (AlphaQError, OSError) as fault:
        return fault, results
    return None, results


def probe(boxed: Sequence[Any]) -> tuple[str, frozenset[str] | None]:
    """This node's version, and which weight files it can read, None where what is shared has none."""
    asked = getattr(_shared_of(boxed), "readable_files", None)
    return own_version(), None if asked is None else asked()


def sees(token: str) -> bool:
    """Whether a file that the driver has just written is here too, in a folder that can be written to."""
    path = Path(token)
    with suppress(OSError):
        return path.read_text(encoding="utf-8") == path.name and os.access(path.parent, os.W_OK)
    return False
