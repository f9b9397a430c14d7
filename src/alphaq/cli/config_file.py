"""`--config FILE.toml`: options of any command from a file. What is typed wins."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from alphaq.errors import AlphaQError
from alphaq.registry import unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OWN = ("config", "help", "install_completion", "show_completion", "version")
ALTERNATIVES = frozenset({"bits", "bpw", "size", "ear"})
"""Options of which one stands for all: one that is stronger leaves the others out."""
SHARED = "alphaq.shared"
"""In a context's `meta`: parameters whose value is for every command that has them, and was not asked of this one."""


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's values the command's defaults. Raises AlphaQError for a key that no command knows."""
    if path is not None and not context.resilient_parsing:
        context.default_map = _defaults(context, _read(path), path)
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        is_eager=True,
        callback=read_config,
        help="Take options from a TOML file; what is typed wins.",
    ),
]


class _Option(Protocol):
    """What is asked of typer's options."""

    name: str
    opts: list[str]
    is_flag: bool
    multiple: bool


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AlphaQError(f"--config {path} cannot be read: {error.strerror}. Check the path.") from None
    except ValueError as error:
        raise AlphaQError(f"--config {path} is not TOML: {error}. Write for example bits = 2.5.") from None


def _defaults(context: typer.Context, content: Mapping[str, object], path: Path) -> dict[str, object]:
    """The command's values by parameter: those of its table before those at the top."""
    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    for name in tables.keys() - commands.keys():
        raise AlphaQError(f"{path}: {unknown('command', name, commands)}")
    options = {name: _options(command) for name, command in commands.items()}
    for name, table in tables.items():
        _require_known(table, options[name], f"option of {name}", path)
    shared = {key: value for key, value in content.items() if key not in tables}
    _require_known(shared, {key: one for known in options.values() for key, one in known.items()}, "option", path)
    own, table = options[str(context.info_name)], tables.get(str(context.info_name), {})
    stronger = {_key(key) for key in table}
    if stronger & ALTERNATIVES:
        stronger |= ALTERNATIVES
    usual = {key: value for key, value in shared.items() if _key(key) in own.keys() - stronger}
    context.meta[SHARED] = frozenset(own[_key(key)].name for key in usual)
    return {own[_key(key)].name: _value(own[_key(key)], key, value, path) for key, value in {**usual, **table}.items()}


def without_beaten(context: typer.Context, arguments: Mapping[str, object]) -> dict[str, object]:
    """The command's arguments without those of the file that a typed alternative leaves out."""
    typed = {name for name in ALTERNATIVES & arguments.keys() if _source(context, name) == "COMMANDLINE"}
    beaten = {name for name in ALTERNATIVES & arguments.keys() if _source(context, name) == "DEFAULT_MAP"}
    return {**arguments, **dict.fromkeys(beaten, None)} if typed else dict(arguments)


def asked_for(context: typer.Context) -> frozenset[str]:
    """Names of the parameters that a user gave: on the command line, or for this command in a file."""
    shared = context.meta.get(SHARED, frozenset())
    sources = {name: _source(context, name) for name in context.params}
    return frozenset(
        name
        for name, source in sources.items()
        if source == "COMMANDLINE" or (source == "DEFAULT_MAP" and name not in shared)
    )


def _source(context: typer.Context, name: str) -> str | None:
    source = context.get_parameter_source(name)
    return None if source is None else source.name


def _options(command: Any) -> dict[str, _Option]:
    """A command's options by their names with underscores."""
    names = {
        _key(flag.removeprefix("--")): one
        for one in command.params
        if one.param_type_name == "option"
        for flag in one.opts
        if flag.startswith("--")
    }
    return {name: one for name, one in names.items() if name not in OWN}


def _key(name: str) -> str:
    return name.replace("-", "_")


def _require_known(table: Mapping[str, object], options: Mapping[str, _Option], kind: str, path: Path) -> None:
    for key in table:
        if _key(key) not in options:
            raise AlphaQError(f"{path}: {unknown(kind, key, (name.replace('_', '-') for name in options))}")


def _value(option: _Option, key: str, value: object, path: Path) -> object:
    """A value as the command line would have it; what is repeated there may stand alone in the file."""
    if isinstance(value, bool) != bool(option.is_flag) or isinstance(value, dict):
        wanted = "true or false" if option.is_flag else "a number or text"
        raise AlphaQError(f"{path}: {key} = {value!r} is not {wanted}.")
    if isinstance(value, list) and not option.multiple:
        raise AlphaQError(f"{path}: {key} takes one value, not {len(value)}.")
    values = value if isinstance(value, list) else [value]
    if option.multiple and (odd := [one for one in values if isinstance(one, bool | list | dict)]):
        raise AlphaQError(f"{path}: {key} holds {odd[0]!r}, which is not a number or text.")
    return values if option.multiple else value
