"""What was measured of a machine, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from alphaq.formats.table import parse_choice
from alphaq.report.tables import plain_table

if TYPE_CHECKING:
    from alphaq.measuring.bandwidth import Bandwidth


def speeds_table(found: Bandwidth) -> Table:
    """A row for each engine and format, GB/s of weights as they are stored."""
    table = plain_table(
        f"{found.machine}: memory {found.bytes_per_second / 1e9:.1f} GB/s on {found.threads} threads",
        *("engine", "format", "GB/s"),
    )
    for engine, rates in found.engines.items():
        table.add_section()
        for name, rate in sorted(rates.formats, key=lambda one: parse_choice(one[0])):
            table.add_row(engine, name, f"{rate / 1e9:.2f}")
        table.add_row(engine, "beside, of a layer", f"{rates.layer_ns / 1e6:.3f} ms")
        table.add_row(engine, "beside, of a token", f"{rates.token_ns / 1e6:.3f} ms")
    return table
