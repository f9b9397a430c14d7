"""What fits into which memory, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from alphaq.nouns.rates import Rates
from alphaq.planning.fitting import MACHINES_GIB
from alphaq.report.tables import human_bytes, plain_table, predicted_words

if TYPE_CHECKING:
    from alphaq.planning.fitting import Fit


def fits_table(found: Sequence[Fit], rates: Rates) -> Table:
    """A row for each memory: the one asked for first, then usual machines, of which an eighth is left to the system.

    rates: how fast the engine reads the formats.
    """
    serving = found[0].memory.serving
    table = plain_table(
        f"What fits with {serving.parallel} × {serving.context:,} tokens of {serving.kv_type} cache",
        *("machine", "memory", "for weights", "weight files", "bits", "predicted KL", "tokens/s", "context full"),
    )
    names = ["yours", *(f"{gib:g} GB" for gib in MACHINES_GIB)]
    for number, (name, one) in enumerate(zip(names, found, strict=True)):
        table.add_row(name, *_cells(one, rates), style="bold" if number == 0 else None)
        if number == 0:
            table.add_section()
    return table


def _cells(one: Fit, rates: Rates) -> list[str]:
    cells = [human_bytes(one.memory.serving.memory_bytes), human_bytes(max(0, one.memory.weights))]
    speeds = one.speeds(rates)
    if one.plan is None or speeds is None:
        return [*cells, "nothing fits", *[""] * 4]
    plan = one.plan
    loss = f"loss {plan.objective:.4g}" if plan.prediction is None else predicted_words(plan.prediction)
    bits = plan.bits_per_weight or plan.average_bits or 0.0
    return [*cells, human_bytes(plan.size_bytes or 0), f"{bits:.2f}", loss, *map(_speed, speeds)]


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"
