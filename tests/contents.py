"""What lies in a folder, to compare two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def digests(files: Iterable[Path]) -> dict[str, str]:
    """By name. Of two that differ pytest then names the files, and does not spend minutes on how their bytes differ."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(files)}


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files of a folder."""
    return digests(folder.iterdir())
