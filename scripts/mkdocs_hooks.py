"""What the site needs beside mkdocs: files outside docs/, and lists as the code host reads them.

Our Markdown links by relative paths, which work where the code is hosted. Two things differ on the site:

- A link may leave docs/ (a result of a benchmark, CONTRIBUTING.md). Such a file becomes a part of the site: Markdown of
  the top folder as a page beside the others, anything else under files/, and links are rewritten to where it lies.
- The code host takes what is indented like an item's text as a part of that item; Python-Markdown asks for four
  columns.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TOP_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s#]+)((?:#[^)\s]*)?\))")
ITEM = re.compile(r"(?:-|\d+\.) +")


def outside(page: Path) -> set[str]:
    """Files of the repository outside docs/ that a page links to, as paths from the top folder."""
    found = set()
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        target = (page.parent / match[2]).resolve()
        if target.is_file() and target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs"):
            found.add(target.relative_to(ROOT).as_posix())
    return found


def place_on_site(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    if path.startswith("docs/"):
        return path[len("docs/") :]
    return path if path in TOP_PAGES else f"files/{path}"


def on_files(files: Files, config: Any) -> Files:
    pages = [ROOT / name for name in TOP_PAGES]
    pages += [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    for path in sorted(set(TOP_PAGES).union(*(outside(page) for page in pages))):
        added = File.generated(config, place_on_site(path), abs_src_path=str(ROOT / path))
        if added.src_uri not in files.src_uris:
            files.append(added)
    return files


def rewrite_links(markdown: str, path: str) -> str:
    """Relative links of a file of the repository, as they are from its place on the site."""
    here = posixpath.dirname(place_on_site(path))

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if not (ROOT / target).exists():
            return match[0]  # mkdocs reports it
        return match[1] + posixpath.relpath(place_on_site(target), here or ".") + match[3]

    return LINK.sub(rewritten, markdown)


def indent_items(markdown: str) -> str:
    """Four columns for what belongs to an item of a list, and a line between an item of several parts and the next."""
    lines: list[str] = []
    width, fenced, parts = 0, False, False
    for line in markdown.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        if fenced:
            lines.append(line)
            continue
        marker = ITEM.match(line)
        if marker:
            if width and parts and lines[-1].strip():
                lines.append("")
            width, parts = len(marker[0]), False
            lines.append(marker[0].rstrip().ljust(4) + line[width:])
        elif width and line.startswith(" " * width):
            parts |= not lines[-1].strip()
            lines.append(" " * (4 - width) + line)
        else:
            if line.strip() and not line.startswith(" "):
                width = 0
            lines.append(line)
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    return indent_items(rewrite_links(markdown, source))
