"""What commands print: JSON on stdout for programs, tables for people; progress and notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PIPED_WIDTH, WIDEST = 120, 400
err = Console(stderr=True)


def set_quiet(quiet: bool) -> bool:
    """Whether only errors and warnings go to stderr from now on."""
    err.quiet = quiet
    return quiet


def tell(line: str) -> None:
    """Say something on stderr, as it is."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def note(*lines: str) -> None:
    """Say what a user should know."""
    for line in lines:
        tell(f"note: {line}")


def complain(line: str) -> None:
    """Say what is wrong, however quiet it is to be."""
    quiet = err.quiet
    set_quiet(False)
    tell(line)
    set_quiet(quiet)


def progress(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """Yield the items under a bar with rate and time left, on stderr; plainly where that is no terminal."""
    if err.quiet or not err.is_terminal:
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")
        for item in items:
            yield item
            bar.advance(task)
            speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
            bar.update(task, rate=f"{speed:.1f}/s" if speed else "")


def _as_json(record: object) -> object:
    """A frozen record as an object of its fields."""
    if is_dataclass(record) and not isinstance(record, type):
        return asdict(record)
    if isinstance(record, BaseModel):
        return record.model_dump(mode="json")
    raise TypeError(f"{type(record).__name__} is not JSON")


def show(as_json: bool, data: Any, *parts: Any) -> None:
    """Print JSON on stdout, records by their fields, or what people read.

    parts: text, tables, and functions that make either for a console.
    """
    if as_json:
        sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False, default=_as_json) + "\n")
    else:
        console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        for part in parts:
            if callable(part):
                drawn = part(console)
                if drawn:
                    console.print(drawn, markup=False, highlight=False, soft_wrap=True)
                continue
            if not sys.stdout.isatty():  # nothing is cut off in a file
                console.width = WIDEST
                console.width = max(PIPED_WIDTH, console.measure(part).maximum)
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
