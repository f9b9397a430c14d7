"""`alphaq engines`: what plans can be made for."""

from __future__ import annotations

from alphaq.cli.means import JsonOption
from alphaq.terminal import show


def engines(as_json: JsonOption = False) -> None:
    """List the engines that a plan can be made for, what shares a choice in each, and the choices."""
    from alphaq.engines.profiles import ENGINES
    from alphaq.report.tables import engines_table

    rows = [
        {
            "engine": one.name,
            "summary": one.summary,
            "unit": one.unit,
            "choices": [str(choice) for choice in one.choices],
            "defaults": [str(choice) for choice in one.defaults],
            "writes": one.export is not None,
        }
        for one in ENGINES.values()
    ]
    show(as_json, rows, engines_table(ENGINES.values()))
