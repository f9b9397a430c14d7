"""Commands made from the records they take: every field with an `Option` is one, of all commands in the same way.

A command is a plain function. Of its parameters, those that are records turn into the options of their fields; the
function gets the records back, or, as `Asked`, what was typed for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError

from alphaq.cli.config_file import ConfigOption, asked_for, without_beaten
from alphaq.errors import AlphaQError
from alphaq.nouns.option import Setting, settings_of
from alphaq.nouns.plan import first_fault
from alphaq.terminal import set_quiet

R = TypeVar("R", bound=BaseModel)
SIMPLE = (bool, int, float, str, Path)
COMMAND = "command"  # the parameter for what typer knows of the command that runs
MORE = "more"  # the parameter of arguments that are further values of an option
QuietOption = Annotated[
    bool, typer.Option("--quiet", callback=set_quiet, help="Show no progress and no notes, only errors.")
]


@dataclass(frozen=True)
class Shown:
    """What a command offers of a record: `only` some fields, or all `without` some.

    required: fields that must be given. defaults: by field, where they are not the record's. panel: heading of those
    that have none.
    """

    only: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)
    panel: str | None = None

    def settings(self, record: type[BaseModel]) -> dict[str, Setting]:
        """The settings that are offered, by field."""
        every = settings_of(record)
        return {name: every[name] for name in self.only or every if name not in self.without}

    def parameter(self, setting: Setting) -> Parameter:
        """The option of a setting, as typer reads it."""
        name, flag = setting.field, setting.flag
        kind = str if setting.names else setting.option.typed or (get_args(setting.kind) or (setting.kind,))[0]
        kind = kind if kind in SIMPLE else str
        required = setting.required or name in self.required
        default = self.defaults.get(name, Parameter.empty if required else setting.default)
        if kind is bool and default is not False:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        told = typer.Option(
            flag,
            help=setting.option.help,
            rich_help_panel=setting.option.panel or self.panel,
            metavar=setting.option.metavar,
            min=setting.least,
        )
        asked: Any = list[kind] if setting.several else kind  # type: ignore[valid-type]
        if default == ():
            default = None
        if default is None:
            asked = asked | None
        return Parameter(setting.parameter, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[asked, told])


@dataclass(frozen=True)
class Asked(Generic[R]):
    """What was typed for a record, before it is checked.

    values: by field, defaults included. typed: fields that were typed, each with what it is called on the command line.
    """

    record: type[R]
    values: Mapping[str, Any]
    typed: Mapping[str, str]

    def parsed(self, name: str) -> Any:
        """The value of one field. Raises AlphaQError."""
        return settings_of(self.record)[name].parse(self.values[name])

    def build(self, **known: object) -> R:
        """The record, with the `known` fields as they are. Raises AlphaQError for what is wrong with one."""
        names = [name for name in self.values if name in self.record.model_fields and name not in known]
        try:
            return self.record(**{name: self.parsed(name) for name in names}, **known)
        except ValidationError as error:
            raise AlphaQError(f"{first_fault(error)}. See --help.") from None


@dataclass(frozen=True)
class _Group:
    """A parameter of a command that is a record: what is offered of it, and whether it is to be built."""

    record: type[BaseModel]
    shown: Shown
    built: bool

    @classmethod
    def of(cls, annotation: Any) -> _Group | None:
        """None for a parameter that is no record."""
        shown = Shown()
        if get_origin(annotation) is Annotated:
            annotation, *notes = get_args(annotation)
            shown = next((note for note in notes if isinstance(note, Shown)), shown)
        if get_origin(annotation) is Asked:
            return cls(get_args(annotation)[0], shown, False)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return cls(annotation, shown, True)
        return None

    @property
    def settings(self) -> dict[str, Setting]:
        return self.shown.settings(self.record)

    def parameters(self) -> Iterable[Parameter]:
        """The options, and an argument for further values of one."""
        for setting in self.settings.values():
            yield self.shown.parameter(setting)
            if setting.option.more is not None:
                told = typer.Argument(metavar=f"[{setting.option.more}]...", help=f"More values for {setting.flag}.")
                yield Parameter(
                    MORE, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[Path] | None, told]
                )

    def taken(self, arguments: MutableMapping[str, Any], typed: frozenset[str]) -> BaseModel | Asked[Any]:
        """The record, or what was asked for; its options are removed from the command's arguments."""
        values, called = {}, {}
        for name, setting in self.settings.items():
            values[name] = arguments.pop(setting.parameter)
            if setting.parameter in typed:
                called[name] = setting.flag
            if setting.option.more is not None and (more := arguments.pop(MORE)):
                values[name] = [*(values[name] or ()), *more]
                called.setdefault(name, setting.option.more)
        asked = Asked(self.record, values, called)
        return asked.build() if self.built else asked


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as typer takes it: records spread out into options, `--config` and `--quiet` added."""
    own = signature(function, eval_str=True).parameters
    groups = {name: group for name, one in own.items() if (group := _Group.of(one.annotation)) is not None}
    every = [one for name, one in own.items() if name not in groups and name != COMMAND]
    every += [one for group in groups.values() for one in group.parameters()]
    every += [
        Parameter(COMMAND, Parameter.KEYWORD_ONLY, annotation=typer.Context),
        Parameter("config_file", Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption),
        Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption),
    ]

    @wraps(function)
    def run(command: typer.Context, config_file: object, quiet: bool, **arguments: Any) -> None:
        typed, arguments = asked_for(command), without_beaten(command, arguments)
        records = {name: group.taken(arguments, typed) for name, group in groups.items()}
        function(**arguments, **records, **({COMMAND: command} if COMMAND in own else {}))

    parameters = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in every]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
