"""Compact arrays for the page: base64 of little-endian numbers, and names as templates and numbers."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")


@dataclass(frozen=True)
class PackedArray:
    """A flat little-endian array; type: its numpy type, such as `u2` or `f4`."""

    type: str
    base64: str


@dataclass(frozen=True)
class NameTemplate:
    """A name in which # stands for each of so many numbers."""

    numbers: int
    text: str


@dataclass(frozen=True)
class PackedNames:
    """which: the template of each name. numbers: those of all names, one after another."""

    templates: list[NameTemplate]
    which: PackedArray
    numbers: PackedArray


def packed(values: np.ndarray | Sequence[float], kind: str) -> PackedArray:
    """A flat array in a numpy type."""
    array = np.ascontiguousarray(values, dtype=f"<{kind}")
    return PackedArray(kind, base64.b64encode(array.tobytes()).decode())


def packed_counts(values: np.ndarray) -> PackedArray:
    """The same in the narrowest unsigned type that holds all values."""
    largest = int(values.max(initial=0))
    return packed(values, "u1" if largest < 1 << 8 else "u2" if largest < 1 << 16 else "u4")


def packed_names(names: Iterable[str]) -> PackedNames:
    """Names as templates and numbers. Undone by the page, and by a test."""
    templates: dict[NameTemplate, int] = {}
    which: list[int] = []
    numbers: list[int] = []
    for name in names:
        # Only what reads back the same: no zeros in front, nothing beyond 32 bits; a # of the name's own is no number.
        parts = [] if "#" in name else _NUMBER.findall(name)
        template = NameTemplate(len(parts), _NUMBER.sub("#", name) if parts else name)
        which.append(templates.setdefault(template, len(templates)))
        numbers += map(int, parts)
    return PackedNames(
        list(templates), packed_counts(np.array(which, np.int64)), packed_counts(np.array(numbers, np.int64))
    )
