"""Every table of measured figures says which version made it, when, and by which command."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from conftest import ROOT
from documentation import HISTORY, PAGES

FIGURE = re.compile(r"\d\.\d|\d,\d{3}\b|\de-\d|\d ?%")
MADE_BY = re.compile(
    r"Version \d+\.\d+\.\d+, \d{4}-\d\d-\d\d\b(?:[^|\n]|\n(?!\n))*?"  # within a paragraph
    r"(?:`(?:alphaq|python|make) |:\n\n    alphaq |: \[log\]\((?:research/)?log\.md)"
)
NOT_MEASURED = {
    "docs/engines/llama.cpp.md: ## Check and compare": "what figures mean",
    "docs/engines/settings.md: ### llama.cpp": "values of settings",
    "docs/engines/settings.md: ### mlx": "values of settings",
    "docs/engines/settings.md: ### vllm": "values of settings",
    "docs/fewer-experts.md: ## With bits, in one budget": "limits of options",
    "docs/formats.md: ### Example: 1408 × 2048 at `3g128`": "bytes that a layout has",
    "docs/formats.md: ## plan.json": "bounds of fields",
    "docs/quantizers.md: ## Widths within a matrix": "bits that a layout has",
    "docs/security.md: # Security": "limits",
}
"""Sections whose tables have figures that nobody measured, and what these are."""


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Every heading of a page with the text below it; one of the third level, with that of the second before."""
    second = ""
    for part in re.split(r"(?m)^(?=#{1,6} )", re.sub(r"(?ms)^ *```.*?^ *```$", "", text)):
        heading = part.partition("\n")[0]
        if not heading.startswith("###"):
            second = part
        yield heading, part if part is second else f"{second}\n{part}"


def measured(section: str) -> bool:
    """Whether a table has figures in two rows or more; code and links count for nothing."""
    for table in re.findall(r"(?m)(?:^ *\|.*\n)+", section + "\n"):
        rows = [re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "", row) for row in table.splitlines()[2:]]
        if sum(FIGURE.search(row) is not None for row in rows) > 1:
            return True
    return False


def unexplained(text: str) -> list[str]:
    """Headings of sections with measured tables that do not say what made them."""
    return [heading for heading, section in sections(text) if measured(section) and not MADE_BY.search(section)]


def test_tables_say_what_made_them() -> None:
    pages = {page.relative_to(ROOT).as_posix(): page for page in PAGES}
    found = {
        f"{name}: {heading}"
        for name, page in pages.items()
        if name not in HISTORY
        for heading in unexplained(page.read_text(encoding="utf-8"))
    }
    assert sorted(found - set(NOT_MEASURED)) == []
    assert sorted(set(NOT_MEASURED) - found) == []  # what is exempt is still there


TABLE = "| | KL |\n|---|--:|\n| `a` | 0.0123 |\n| `b` | 0.0456 |\n"


@pytest.mark.parametrize(
    "line",
    [
        "Version 0.1.0, 2026-11-29, `alphaq compare MODEL …`; the default then was `signal`.",
        "Version 0.1.0, 2026-11-29 (`tiny` 2026-11-30), by\n`python benchmarks/smaller.py MODEL`.",
        "Version 0.1.0, 2026-11-29:\n\n    alphaq demo",
        "Version 0.1.0, 2026-11-29, code that was not kept: [log](research/log.md#2026-11-29).",
    ],
)
def test_a_line_beside_a_table_is_found(line: str) -> None:
    assert unexplained(f"## Figures\n\n{TABLE}\n{line}\n") == []
    assert unexplained(f"## Figures\n\n{line}\n\n### Some\n\n{TABLE}") == []
    assert unexplained(f"## Figures\n\n{line}\n\n## Others\n\n{TABLE}") == ["## Others"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Version 0.1.0, `alphaq compare MODEL`.",
        "2026-11-29, `alphaq compare MODEL`.",
        "Version 0.1.0, 2026-11-29.\n\nRun `alphaq compare MODEL`.",
        "Version 0.1.0, 2026-11-29, by hand.",
    ],
)
def test_a_line_that_lacks_something_is_found(line: str) -> None:
    assert unexplained(f"# Page\n\n## Figures\n\n{TABLE}\n{line}\n") == ["## Figures"]


def test_indented_tables_count_and_codes_do_not() -> None:
    assert unexplained("## In a list\n\n" + "".join(f"  {row}\n" for row in TABLE.splitlines())) == ["## In a list"]
    assert unexplained("## Names\n\n| a |\n|---|\n| `t1.25` |\n| [arXiv 2406.08155](https://x.org/1.5) |\n") == []
