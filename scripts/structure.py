"""Count what should stay small in the source: long modules and functions, untyped records, loose modules, circles.

python scripts/structure.py [FOLDER]    # src by default; prints a table
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

LONG_MODULE, LONG_FUNCTION = 400, 60
ENGINES = ("native", "llama.cpp", "vllm", "mlx", "gptqmodel")
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


def compared_names(tree: ast.AST, names: tuple[str, ...]) -> Iterator[int]:
    """Lines that compare something with one of the names, or look it up in a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            texts = [one for operand in operands for one in ast.walk(operand) if isinstance(one, ast.Constant)]
            if any(one.value in names for one in texts):
                yield node.lineno
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant) and node.value.value in names:
            yield node.value.lineno


def counts(source: Path) -> dict[str, list[str]]:
    """What was counted, each with the places."""
    found: dict[str, list[str]] = defaultdict(list)
    known = modules(source)
    edges = {}
    for name, path in known.items():
        text = path.read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.count("\n")
        edges[name] = imports(tree, known) - {name}
        where = str(path.relative_to(source / "alphaq"))
        room = name.split(".")[1] if "." in name else ""
        if lines > LONG_MODULE:
            found[f"modules over {LONG_MODULE} lines"].append(f"{where} {lines}")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LONG_FUNCTION:
                    found[f"functions over {LONG_FUNCTION} lines"].append(f"{where}:{node.lineno} {node.name} {length}")
        for number, line in enumerate(text.splitlines(), 1):
            if "dict[str, Any]" in line:
                found["dict[str, Any]"].append(f"{where}:{number}")
            if room != "formats" and re.search(r"bits\s*[=!]=\s*16\b", line):
                found["bits == 16 outside formats"].append(f"{where}:{number}")
        if room != "engines":
            found["comparisons with an engine's name"] += [f"{where}:{n}" for n in compared_names(tree, ENGINES)]
        if room != "quantizers":
            found["comparisons with a quantizer's name"] += [f"{where}:{n}" for n in compared_names(tree, QUANTIZERS)]
        if name.count(".") == 1 and path.name != "__init__.py" and path.parent.name == "alphaq":
            found["loose modules"].append(where)
    found["import circles"] = [" <-> ".join(group) for group in circles(edges)]
    return found


def main() -> None:
    for what, places in counts(Path(sys.argv[1] if len(sys.argv) > 1 else "src")).items():
        print(f"{len(places):4}  {what}")
        if "-v" in sys.argv:
            print(*(f"        {place}" for place in places), sep="\n")


if __name__ == "__main__":
    main()
