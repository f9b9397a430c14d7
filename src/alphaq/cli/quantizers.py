"""`alphaq quantizers`: the ways to find codes, what each looks at and which engines it works for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alphaq.cli.means import JsonOption
from alphaq.terminal import show

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ListedQuantizer:
    """A row. engines: those that it works for; usual_for: those that use it unless told otherwise."""

    quantizer: str
    summary: str
    looks_at: str
    engines: tuple[str, ...]
    usual_for: tuple[str, ...]


def quantizers(as_json: JsonOption = False) -> None:
    """List the quantizers, what each does, and the engines it works for."""
    rows = list(listed_quantizers())
    show(as_json, [asdict(row) for row in rows], _table(rows))


def listed_quantizers() -> Iterator[ListedQuantizer]:
    """Every quantizer, in the order of their table."""
    from alphaq.engines.profiles import ENGINES
    from alphaq.quantizers.base import QUANTIZERS, offered

    usual = {engine.name: engine.quantizer for engine in ENGINES.values()}
    for name, one in QUANTIZERS.items():
        yield ListedQuantizer(
            name,
            one.summary,
            "inputs" if one.looks_at_inputs else "weights",
            tuple(engine for engine, own in usual.items() if name in offered(own)),
            tuple(engine for engine, own in usual.items() if name == own),
        )


def _table(rows: list[ListedQuantizer]) -> Table:
    from alphaq.report.tables import plain_table

    table = plain_table("Quantizers", "quantizer", "looks at", "engines (* uses it by default)", "does")
    for column in table.columns[1:]:
        column.justify = "left"
    for row in rows:
        engines = (f"{engine}*" if engine in row.usual_for else engine for engine in row.engines)
        table.add_row(row.quantizer, row.looks_at, ", ".join(engines), row.summary)
    return table
