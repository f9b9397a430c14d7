"""`alphaq methods`: the allocators."""

from __future__ import annotations

from alphaq.cli.means import JsonOption
from alphaq.terminal import show


def methods(as_json: JsonOption = False) -> None:
    """List the allocators, what each goes by and what it needs."""
    from alphaq.report.tables import methods_table
    from alphaq.sensitivity.methods import METHODS

    rows = [
        {"method": name, "summary": one.summary, "needs_text": one.needs_text, "kind": one.kind}
        for name, one in METHODS.items()
    ]
    show(as_json, rows, methods_table(METHODS))
