"""Tables of named parts: one line per part, and an error that helps when a name is mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from alphaq.errors import UnknownNameError

T = TypeVar("T")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence shown for a name that is not known: closest match, then everything available."""
    available = sorted(known)
    close = difflib.get_close_matches(name, available, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} Available: {', '.join(available)}."


def lookup(kind: str, table: Mapping[str, T], name: str) -> T:
    """`table[name]`, or UnknownNameError with the closest name and the list of all."""
    if name not in table:
        raise UnknownNameError(unknown(kind, name, table))
    return table[name]
