"""Count what should stay small in the source: long modules and functions, untyped records, loose modules, circles.

python scripts/structure.py [FOLDER] [-v]    # src by default; -v names the places

tests/test_structure.py holds every count to its limit.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

LONG_MODULE, LONG_FUNCTION = 400, 60
ROOMS = {
    "native": "engines/native",
    "llama.cpp": "engines/gguf",
    "vllm": "engines/vllm",
    "mlx": "engines/mlx",
    "gptqmodel": "engines/gptqmodel",
}
"""Where an engine's name may be compared."""
QUANTIZERS = ("rtn", "mse", "debiased", "clipped", "minmax", "hqq", "gptq", "learned", "ggml", "affine", "symmetric16")


def modules(source: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((source / "alphaq").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """The package's modules that a module imports, wherever in it, for types alone or not."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in known} or {node.module}
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def compared_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts that something is compared with, and their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            places = {
                (node.lineno, one.value)
                for operand in (node.left, *node.comparators)
                for one in ast.walk(operand)
                if isinstance(one, ast.Constant) and isinstance(one.value, str)
            }
            yield from sorted(places)
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
            yield node.value.lineno, str(node.value.value)


def counts(source: Path) -> dict[str, list[str]]:
    """What was counted, each with its places."""
    found: dict[str, list[str]] = defaultdict(list)
    known = modules(source)
    edges = {}
    for name, path in known.items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        edges[name] = imports(tree, known) - {name}
        where = str(path.relative_to(source / "alphaq"))
        if "/" not in where and path.name != "__init__.py":
            found["loose modules"].append(where)
        for what, place in counted_in(tree, text, where):
            found[what].append(f"{where}{place}")
    for path in sorted((source / "alphaq").rglob("*.j2")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if ROOMS.keys() & set(re.findall(r"""[=!]=\s*["']([^"']+)["']""", line)):
                found["comparisons with an engine's name"].append(f"{path.name}:{number}")
    found["import circles"] = [" <-> ".join(group) for group in circles(edges)]
    return found


def counted_in(tree: ast.AST, text: str, where: str) -> Iterator[tuple[str, str]]:
    """What one module adds to the counts, each with its place in the module."""
    lines = text.splitlines()
    if len(lines) > LONG_MODULE:
        yield f"modules over {LONG_MODULE} lines", f" {len(lines)}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > LONG_FUNCTION:
                yield f"functions over {LONG_FUNCTION} lines", f":{node.lineno} {node.name} {length}"
    for number, line in enumerate(lines, 1):
        if "dict[str, Any]" in line:
            yield "dict[str, Any]", f":{number}"
        if not where.startswith("formats/") and re.search(r"bits\s*[=!]=\s*16\b", line):
            yield "bits == 16 outside formats", f":{number}"
    for number, compared in compared_texts(tree):
        if compared in ROOMS and not where.startswith(ROOMS[compared]):
            yield "comparisons with an engine's name", f":{number}"
        if compared in QUANTIZERS and not where.startswith("quantizers/"):
            yield "comparisons with a quantizer's name", f":{number}"


def main() -> None:
    folder = next((one for one in sys.argv[1:] if one != "-v"), "src")
    for what, places in sorted(counts(Path(folder)).items()):
        print(f"{len(places):4}  {what}")
        if "-v" in sys.argv:
            print(*(f"        {place}" for place in places), sep="\n")


if __name__ == "__main__":
    main()
