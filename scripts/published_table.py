"""What is found in published checkpoints: write the table in docs/models.md.

    published_table.py MAKER [NAME...]

MAKER is a program that writes stand-ins, checkpoints with true configs, names, shapes and dtypes but no data: `MAKER
list` prints a line for each, its name first and the number of expert matrices that must be found last; `MAKER make NAME
-o FOLDER` writes FOLDER/NAME. One is made at a time, inspected and deleted. With names only their rows are printed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import alphaq
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.summary import summarize
from alphaq.engines.native import PROFILE
from alphaq.errors import AlphaQError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Role
from alphaq.planning.kept import kept_shares

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- published: begin -->\n", "<!-- published: end -->\n"
HEAD = f"""Version {alphaq.__version__}, {date.today()}, `python scripts/published_table.py MAKER`.

| published checkpoint | read as | expert matrices | in 16 bits | most of it |
|---|---|--:|--:|---|
"""
SHOWN = 3


def named(maker: str) -> dict[str, str]:
    """Number of expert matrices that a stand-in promises, by its name."""
    listed = subprocess.run([sys.executable, maker, "list"], check=True, capture_output=True, text=True).stdout
    return {line.split()[0]: line.split()[-1] for line in listed.splitlines() if line.strip()}


def row(maker: str, name: str, promised: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, maker, "make", name, "-o", scratch], check=True)
        try:
            source = open_checkpoint(Path(scratch) / name)
        except AlphaQError as error:
            return f"| {name} | | | | refused: {str(error).replace(f'{scratch}/', '').replace('|', '/')} |"
    found = len(source.with_role(Role.EXPERT))
    count = f"{found:,}" if str(found) == promised else f"**{found:,} of {promised}**"
    kept = kept_shares(source, usual_choices(source))
    most = ", ".join(f"`{part}` {100 * share:.1f} %" for part, share in list(kept.items())[:SHOWN])
    return f"| {name} | {source.architecture.name} | {count} | {100 * share_in_16_bits(source):.1f} % | {most} |"


def usual_choices(source: Checkpoint) -> dict[str, Choice]:
    """All that a native plan quantizes unless a user wants less."""
    roles = {source.planned_role, *PROFILE.role_bits}
    return {matrix.name: Choice(4, 128) for matrix in source.matrices if matrix.role in roles}


def share_in_16_bits(source: Checkpoint) -> float:
    chosen = usual_choices(source)
    quantized = sum(matrix.parameters for matrix in source.matrices if matrix.name in chosen)
    return 1 - quantized / summarize(source).parameters


def main() -> None:
    maker, *names = sys.argv[1:]
    every = named(maker)
    rows = []
    for name in names or every:
        rows.append(row(maker, name, every[name]))
        print(rows[-1], flush=True)
    if not names:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(before + BEGIN + HEAD + "\n".join(rows) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
