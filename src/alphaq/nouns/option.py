"""How a setting is asked for on a command line, said once: at the field of the record that holds it.

A field `Annotated[T, Option("…")]` of a frozen pydantic record is an option of every command that takes the record; the
command that a report or a card repeats, and what `compare` may vary, follow from it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from alphaq.errors import AlphaQError
from alphaq.registry import unknown


@dataclass(frozen=True)
class Option:
    """The option of a field.

    panel: heading in the help. name: where it is not the field's. typed: type of what is read from the command line,
    where it is not the field's. parse: from that to the field's value (of each, where there are several); raises
    AlphaQError. show: what to type for a value. metavar: how the help calls the value. more: name of arguments that are
    further values.
    varies: whether `compare` may set it for each method.
    """

    help: str
    panel: str | None = None
    name: str | None = None
    typed: type | None = None
    parse: Callable[[Any], Any] | None = None
    show: Callable[[Any], str] = str
    metavar: str | None = None
    more: str | None = None
    varies: bool = False


@dataclass(frozen=True)
class Setting:
    """A field with its option. kind: its type, without None. least: the smallest number allowed, None for any."""

    field: str
    kind: Any
    default: Any
    required: bool
    option: Option
    least: float | None = None

    @property
    def parameter(self) -> str:
        """The option's name as an identifier."""
        return self.option.name or self.field

    @property
    def flag(self) -> str:
        """The option as it is typed; without its `no-` where it is not off by default."""
        return f"--{self.parameter.replace('_', '-')}"

    @property
    def several(self) -> bool:
        """Whether the option may be repeated."""
        return get_origin(self.kind) is tuple

    @property
    def names(self) -> tuple[str, ...]:
        """The values there are, where they have names; else none."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def parse(self, typed: Any) -> Any:
        """The field's value for what was typed; None and nothing typed are the default. Raises AlphaQError."""
        if typed is None:
            return self.default
        if self.names and typed not in self.names:
            raise AlphaQError(unknown(self.flag, typed, self.names))
        if self.option.parse is None:
            return tuple(typed) if self.several else typed
        return tuple(map(self.option.parse, typed)) if self.several else self.option.parse(typed)

    def words(self, value: Any) -> list[str]:
        """What to type for a value."""
        if isinstance(value, bool):
            return [self.flag if value else f"--no-{self.flag.removeprefix('--')}"]
        values = value if self.several else (value,)
        return [word for one in values for word in (self.flag, self.option.show(one))]


def settings_of(record: type[BaseModel]) -> dict[str, Setting]:
    """Settings of a record and of the records in it, by field, in their order."""
    return {setting.field: setting for setting in _settings(record)}


def _settings(record: type[BaseModel]) -> Iterator[Setting]:
    for name, field in record.model_fields.items():
        kind = _without_none(field.annotation)
        option = next((one for one in field.metadata if isinstance(one, Option)), None)
        if option is not None:
            yield Setting(name, kind, field.default, field.is_required(), option, _least(field))
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else annotation


def _least(field: FieldInfo) -> float | None:
    return next((one.ge for one in field.metadata if hasattr(one, "ge")), None)
