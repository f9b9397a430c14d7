"""`alphaq cache`: what earlier runs have measured, how much of the disk it takes, and how to be rid of it."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from alphaq.cli.means import JsonOption, cache_folder
from alphaq.errors import AlphaQError, JournalError
from alphaq.terminal import note, show

ENTRY = re.compile(r"[0-9a-f]{32}")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything; the next runs measure anew.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where measurements are kept, for how many models, and their size; with --clear remove them."""
    from alphaq.report.tables import human_bytes

    folder = cache_folder()
    entries = _entries(folder)
    sizes = {entry: _size(entry) for entry in entries}
    removed = [entry for entry in entries if _removed(entry)] if clear else []
    freed = sum(sizes[entry] for entry in removed)
    left, size = len(entries) - len(removed), sum(sizes.values()) - freed
    told = {"path": str(folder), "entries": left, "size_bytes": size, "removed": len(removed), "removed_bytes": freed}
    line = f"{folder}: measurements of {left} models, {human_bytes(size)}"
    if clear:
        line = f"{folder}: {len(removed)} entries removed, {human_bytes(freed)}"
    show(as_json, told, line)


def _entries(folder: Path) -> list[Path]:
    """What AlphaQ keeps there, and nothing else that may lie in a folder of the user's choice."""
    from alphaq.measuring.cache import MEASUREMENTS_NAME

    try:
        return sorted(
            one for one in folder.glob("*") if ENTRY.fullmatch(one.name) and (one / MEASUREMENTS_NAME).is_file()
        )
    except OSError as error:
        raise AlphaQError(f"{folder} cannot be read: {error.strerror}. Check its permissions.") from None


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())


def _removed(entry: Path) -> bool:
    """Remove an entry, unless a run is at work with it."""
    from alphaq.measuring.cache import MEASUREMENTS_NAME
    from alphaq.work.journal import Journal

    try:
        with closing(Journal(entry / MEASUREMENTS_NAME)):
            shutil.rmtree(entry)
    except JournalError:
        note(f"{entry.name} is in use by another run and stays")
        return False
    return True
