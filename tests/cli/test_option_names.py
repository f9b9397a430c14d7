"""Every option of every command with its default, as a list that a change of any shows in.

python tests/cli/test_option_names.py    # writes the list anew
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

LIST = Path(__file__).with_name("options.txt")


def lines() -> Iterator[str]:
    from alphaq.cli.app import app

    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        for one in sorted(command.params, key=lambda one: (one.param_type_name, one.name)):
            yield f"{name} {called(one)} {'required' if one.required else one.default}{repeats(one)}"


def called(one: Any) -> str:
    flags = "/".join((*one.opts, *one.secondary_opts))
    return flags if one.param_type_name == "option" else flags.upper()


def repeats(one: Any) -> str:
    return " ..." if getattr(one, "multiple", False) or one.nargs != 1 else ""


def test_options_and_their_defaults_are_as_listed() -> None:
    assert list(lines()) == LIST.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    LIST.write_text("\n".join(lines()) + "\n", encoding="utf-8")
