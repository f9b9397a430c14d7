"""The report: one HTML file that holds all it needs and asks the network for nothing.

Charts are drawn by the page's own script on SVG and canvas. A chart library would be the larger part of the file
(plotly.js: 4.6 MB) for five small charts, and none draws 70 000 clickable cells that a slider repaints.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from alphaq.report.content import Sources, content_of
from alphaq.report.page import Content, PageData
from alphaq.report.runs import ComparedRow, Run
from alphaq.report.slider import SliderData
from alphaq.report.tables import human_bytes


def page_of(content: Content) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("alphaq.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["bytes"] = human_bytes
    environment.filters["figures"] = figures
    environment.filters["with_code"] = with_code
    script = _part("report.js")
    return environment.get_template("report.html.j2").render(
        **vars(content.facts),
        missing=content.missing,
        style=Markup(_part("report.css")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(_json(content.data)),
    )


def figures(value: float, digits: int = 4) -> str:
    """A number with so many digits: 575,437 and 0.0321 rather than 5.754e+05."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e9 else f"{rounded:.{digits}g}"


def with_code(text: str) -> Markup:
    """Escaped text, in which `commands` stand as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


@dataclass(frozen=True)
class Written:
    """What a page shows, in numbers. plan_loss, path_loss: at the plan's budget. methods: that are compared."""

    bytes: int
    matrices: int
    units: int | None
    steps: int | None
    plan_loss: float | None
    path_loss: float | None
    spectra: int
    methods: int
    missing: list[str]


def write_report(path: Path, run: Run, sources: Sources) -> Written:
    """Write the page."""
    content = content_of(run, sources)
    page = page_of(content).encode()
    path.write_bytes(page)
    facts, slider = content.facts, content.facts.path
    return Written(
        bytes=len(page),
        matrices=facts.matrices,
        units=slider.units if slider else None,
        steps=slider.steps if slider else None,
        plan_loss=slider.plan_loss if slider else None,
        path_loss=slider.loss if slider else None,
        spectra=len(sources.densities),
        methods=len({row.method for row in facts.compared}),
        missing=content.missing,
    )


def _part(name: str) -> str:
    return (files("alphaq.report") / "templates" / name).read_text(encoding="utf-8")


def _json(data: PageData) -> str:
    """JSON that cannot end the element it stands in, whatever names it holds."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_fields)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _fields(record: object) -> dict[str, object]:
    """A record as an object of the page's script."""
    if isinstance(record, ComparedRow):
        return record.model_dump() | {"label": record.label}
    if isinstance(record, SliderData):
        return {re.sub("_(.)", lambda match: match[1].upper(), name): value for name, value in vars(record).items()}
    return dict(vars(record))
