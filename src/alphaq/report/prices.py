"""What a model would cost in an engine, as a table and as a curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from alphaq.report.curve import Curve, CurvePoint, Mark
from alphaq.report.tables import human_bytes, plain_table

if TYPE_CHECKING:
    from alphaq.measuring.rows import Extent
    from alphaq.planning.pricing import Price
    from alphaq.sensitivity.base import Method


def unit_of(method: Method, name: str) -> str:
    """What losses per weight are in. Only those of joint methods are relative."""
    return "weighted relative error" if method.joint else f"loss per weight, {name}"


def extent_words(extent: Extent) -> str:
    """What is read of a model."""
    share = extent.rows / max(1, extent.matrices)
    here = extent.rows + extent.whole - extent.missing
    return (
        f"reads {human_bytes(extent.rows)} of rows, {100 * share:.3g} % of {human_bytes(extent.matrices)} of matrices, "
        f"and {human_bytes(extent.whole)} of routers and norms, in {extent.ranges:,} requests; headers were "
        f"{human_bytes(extent.headers)}" + (f"; {human_bytes(here)} of it lie here" if here else "")
    )


def prices_table(engine: str, found: Sequence[Price], machines: Sequence[Mark], unit: str) -> Table:
    """A row for each size. machines: the bytes that each leaves, from small to large."""
    table = plain_table(
        f"{engine}: what the files would take, and lose",
        *("weight files", "bits", unit, "by what was not read", "machine without the cache"),
    )
    for one in found:
        size = one.plan.size_bytes or 0
        bits = one.plan.bits_per_weight or one.plan.average_bits or 0.0
        machine = next((f"{mark.gib:g} GB" for mark in machines if mark.weights_bytes >= size), "larger")
        table.add_row(
            human_bytes(size), f"{bits:.2f}", f"{one.lost:.3g}", f"± {100 * one.sampling_error:.2g} %", machine
        )
    return table


def prices_curve(model: str, found: Sequence[Price], machines: Sequence[Mark], unit: str) -> Curve | None:
    """None where nothing is lost at any size."""
    lost = {one.plan.size_bytes or 0: one.lost for one in found}
    points = tuple(CurvePoint(size_bytes=size, lost=value) for size, value in sorted(lost.items()) if value > 0)
    return Curve(model=model, unit=unit, points=points, marks=tuple(machines)) if points else None
