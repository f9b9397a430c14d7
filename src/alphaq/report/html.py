"""One self-contained HTML page about a plan: figures, and maps of α and bits by layer and expert."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from alphaq.records import MatrixRef, Plan
from alphaq.report.tables import human_bytes

COLDEST, WARMEST = (68, 1, 84), (253, 231, 37)
MIDDLE = (33, 145, 140)


def colour(position: float) -> str:
    """A colour-blind-safe scale from dark violet (0) through teal to yellow (1)."""
    position = min(1.0, max(0.0, position))
    low, high, local = (COLDEST, MIDDLE, position * 2) if position < 0.5 else (MIDDLE, WARMEST, position * 2 - 1)
    return "rgb({}, {}, {})".format(*(round(a + (b - a) * local) for a, b in zip(low, high, strict=True)))


def heat_maps(plan: Plan, matrices: Iterable[MatrixRef]) -> list[dict[str, Any]]:
    """Two maps (bits, α) per projection; a cell is an expert of a layer."""
    planned = [matrix for matrix in matrices if matrix.name in plan.assignment]
    alphas = sorted(plan.alpha.values())
    widest = max(plan.assignment.values(), default=1)
    narrowest = min(plan.assignment.values(), default=1)

    def cells(members: list[MatrixRef], kind: str) -> list[dict[str, Any]]:
        rows: dict[int | None, list[dict[str, str]]] = {}
        for matrix in sorted(members, key=lambda m: (m.layer or 0, m.expert or 0)):
            bits, alpha = plan.assignment[matrix.name], plan.alpha.get(matrix.name)
            if kind == "bits":
                text, position = str(bits), (bits - narrowest) / max(1, widest - narrowest)
            elif alpha is None:
                text, position = "–", 0.0
            else:
                span = (alphas[-1] - alphas[0]) or 1.0
                text, position = f"{alpha:.2f}", 1 - (alpha - alphas[0]) / span
            title = f"{matrix.name}: {bits} bits, α {'undefined' if alpha is None else f'{alpha:.3f}'}"
            ink = "#000" if position > 0.55 else "#fff"
            rows.setdefault(matrix.layer, []).append(
                {"text": text, "background": colour(position), "ink": ink, "title": title}
            )
        return [{"layer": layer, "cells": row} for layer, row in rows.items()]

    maps = []
    for projection in sorted({str(matrix.projection) for matrix in planned}):
        members = [matrix for matrix in planned if matrix.projection == projection]
        for kind, caption in (
            ("bits", "bits (yellow: most)"),
            ("alpha", "α (yellow: heaviest tail, smallest α)"),
        ):
            maps.append({"title": f"{projection}: {caption}", "rows": cells(members, kind)})
    return maps


def write_report(path: Path, plan: Plan, matrices: Iterable[MatrixRef], rows: list[dict[str, Any]]) -> None:
    """Write the page. `rows` are the compared runs as `alphaq demo --json` prints them."""
    environment = Environment(
        loader=PackageLoader("alphaq.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["bytes"] = human_bytes
    page = environment.get_template("report.html.j2").render(plan=plan, maps=heat_maps(plan, matrices), rows=rows)
    path.write_text(page, encoding="utf-8")
