"""The report: one HTML file that holds all it needs and asks the network for nothing.

Charts are drawn by the page's own script on SVG and canvas. A chart library would be the larger part of the file
(plotly.js: 4.6 MB) for five small charts, and none draws 70 000 clickable cells that a slider repaints.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from alphaq.report.content import Content, Sources, content_of
from alphaq.report.runs import Run
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
        **content.facts,
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


def write_report(path: Path, run: Run, sources: Sources) -> dict[str, Any]:
    """Write the page; returns what `alphaq report --json` prints."""
    content = content_of(run, sources)
    page = page_of(content).encode()
    path.write_bytes(page)
    path_facts = content.facts["path"] or {}
    return {
        "bytes": len(page),
        "matrices": content.facts["matrices"],
        "units": path_facts.get("units"),
        "steps": path_facts.get("steps"),
        "plan_loss": path_facts.get("plan_loss"),
        "path_loss": path_facts.get("loss"),
        "spectra": len(sources.densities),
        "methods": len({row.method for row in content.facts["compared"]}),
        "missing": content.missing,
    }


def _part(name: str) -> str:
    return (files("alphaq.report") / "templates" / name).read_text(encoding="utf-8")


def _json(data: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever names it holds."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
