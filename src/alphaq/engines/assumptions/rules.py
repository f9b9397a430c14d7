"""What an engine takes for granted of one setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alphaq.checkpoint.families.formulas import evaluated, looked_up
from alphaq.errors import ArchitectureError
from alphaq.work.untrusted import JsonObject

UNSET = "none"
"""How a table of allowed values writes null, which TOML lacks."""


@dataclass(frozen=True)
class Fixed:
    """What an engine takes for granted of one setting.

    values: what it may be. equals: a formula of other settings that it may be, too. never: what it may not be. has:
    what a list must hold. when, unless: values of other settings under which this holds, or does not; always by
    default. remedy: what a user can do about it, if more than to use another engine.
    """

    values: tuple[Any, ...] = ()
    equals: str = ""
    never: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    has: tuple[Any, ...] = ()
    remedy: str = ""

    @classmethod
    def parse(cls, entry: Any) -> Fixed:
        """A list of values, or a table."""
        table = entry if isinstance(entry, dict) else {"values": entry}
        values, never = (tuple(_value(one) for one in table.get(key, ())) for key in ("values", "never"))
        when, unless = (
            {name: tuple(map(_value, given)) for name, given in table.get(key, {}).items()}
            for key in ("when", "unless")
        )
        has = tuple(table.get("has", ()))
        return cls(values, table.get("equals", ""), never, when, unless, has, table.get("remedy", ""))

    def allows(self, value: Any, config: JsonObject) -> bool:
        """Whether the engine computes with this value."""
        if not all(looked_up(name, config) in given for name, given in self.when.items()):
            return True
        if any(looked_up(name, config) in given for name, given in self.unless.items()):
            return True
        allowed = [*self.values, *([evaluated(self.equals, config)] if self.equals else [])]
        if allowed and not any(same(value, one) for one in allowed):
            return False
        if self.has and not (isinstance(value, list) and set(self.has) <= set(value)):
            return False
        return not any(same(value, one) for one in self.never)

    def __str__(self) -> str:
        """What is allowed, in words."""
        said = [f"the value of {self.equals}"] if self.equals else [_listed(self.values)] if self.values else []
        said += [f"anything but {_listed(self.never)}"] if self.never else []
        said += [f"a list that has {' and '.join(map(repr, self.has))}"] if self.has else []
        under = "".join(f", with {name} {_listed(given)}" for name, given in self.when.items())
        other = "".join(f", unless {name} is {_listed(given)}" for name, given in self.unless.items())
        return " or ".join(said) + under + other


@dataclass(frozen=True)
class Derived:
    """A setting by another name, or in other words.

    formula: what it is made of; formulas: those of the items of a list. values: what its value, or each of a list, is
    called instead. factor: a setting, 1 if it is missing, by which the value is multiplied and rounded down. constant:
    what it is whatever the config says; with a formula, where that gives nothing.
    """

    formula: str = ""
    formulas: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    constant: Any = None
    factor: str = ""

    @classmethod
    def parse(cls, entry: Any) -> Derived:
        """A formula, or a table."""
        return cls(entry) if isinstance(entry, str) else cls(**entry)

    def value(self, config: JsonObject) -> Any:
        """What the engine is told. Raises ArchitectureError for a word that it has none for."""
        found: Any = [evaluated(one, config) for one in self.formulas] or None
        found = evaluated(self.formula, config) if self.formula else found
        if found is None:
            return self.constant
        if self.factor and (factor := looked_up(self.factor, config)) is not None:
            found = int(found * factor)
        if not self.values:
            return found
        return [self._word(one) for one in found] if isinstance(found, list) else self._word(found)

    def _word(self, one: Any) -> Any:
        if one not in self.values:
            raise ArchitectureError(
                f"config.json: {self.formula} has {one!r:.80}, and the engine is only known to run "
                f"{', '.join(self.values)}. Use --engine native, which runs the model's own class."
            )
        return self.values[one]


def same(one: Any, other: Any) -> bool:
    """Equal, and of one kind: 1 is not true, but 1.0 is 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _value(written: Any) -> Any:
    return None if written == UNSET else written


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, filter(lambda value: value is not None, values))) or UNSET
