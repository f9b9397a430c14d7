"""What architecture files say of a config: values, formulas of several, and what an engine takes for granted.

A formula is a key of the config, or keys and numbers with ` + `, ` * ` and ` / ` (whole division) between them,
computed from left to right; dots lead deeper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from alphaq.work.untrusted import JsonObject


def evaluated(formula: str, config: Mapping[str, Any]) -> Any:
    """What a formula gives, None if a part of it is missing."""
    first, *rest = formula.split(" ")
    value = looked_up(first, config)
    for operator, name in zip(rest[::2], rest[1::2], strict=True):
        other = looked_up(name, config)
        if not (_is_number(value) and _is_number(other)) or (operator == "/" and other == 0):
            return None
        value = value + other if operator == "+" else value * other if operator == "*" else value // other
    return value


def names_in(formula: str) -> list[str]:
    """The config keys that a formula reads."""
    return [name for name in formula.split(" ")[::2] if not name[0].isdigit()]


def current(config: Mapping[str, Any]) -> JsonObject:
    """The config with `rope_parameters`, in which transformers 5 gathers what used to lie in several places.

    Where layers of two kinds turn in two ways, each kind has its own: `full_attention` and `sliding_attention`.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    scaling = dict(old) if isinstance(old, dict) else {}
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    gathered = {"rope_theta": config.get("rope_theta")} | scaling | (new if isinstance(new, dict) else {})
    if "rope_local_base_freq" in config:
        local = {"rope_theta": config["rope_local_base_freq"]}
        gathered = {"full_attention": dict(gathered), "sliding_attention": local} | gathered
    return {**config, "rope_parameters": gathered}


def looked_up(name: str, config: Mapping[str, Any]) -> Any:
    """The value under a key, or the number that the name is; None if there is none."""
    if name[0].isdigit():
        return float(name)
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Assumption:
    """What an engine takes a setting for, whatever a config says.

    values: those that it computes alike; a config that says nothing means the first. formula: the value, made of other
    settings; of_layers: another one for models of so many layers. repeat: a list that goes on so for all layers. least:
    formula of the least number that makes no difference, such as a window as long as the context; none, null, makes no
    difference either. absent, present: whether the setting must not be there, or must. stated: whether a config must
    say it to mean it.
    """

    values: tuple[Any, ...] = ()
    formula: str = ""
    of_layers: Mapping[int, str] = field(default_factory=dict)
    repeat: tuple[Any, ...] = ()
    least: str = ""
    absent: bool = False
    present: bool = False
    stated: bool = True

    @classmethod
    def parse(cls, entry: Any) -> Assumption:
        """A value, or a table with `usual`, `values`, `formula`, `repeat`, `least`, `absent` or `present`."""
        if not isinstance(entry, dict):
            return cls((entry,))
        if "usual" in entry:
            return cls((entry["usual"],), stated=False)
        return cls(
            tuple(entry.get("values", ())),
            entry.get("formula", ""),
            {int(layers): formula for layers, formula in entry.get("of_layers", {}).items()},
            tuple(entry.get("repeat", ())),
            entry.get("least", ""),
            entry.get("absent", False),
            entry.get("present", False),
        )

    def value(self, config: Mapping[str, Any], layers: int) -> Any:
        """What the engine computes with; None for nothing."""
        if self.repeat:
            return list(islice(cycle(self.repeat), layers))
        if self.formula:
            return evaluated(self.of_layers.get(layers, self.formula), config)
        return self.values[0] if self.values else None

    def holds(self, key: str, config: Mapping[str, Any], layers: int) -> bool:
        """Whether the engine computes what the config says."""
        said = looked_up(key, config)
        if said is None or self.present:
            return said is not None or not self.present
        if self.absent:
            return False
        if self.least:
            least = evaluated(self.least, config)
            return _is_number(said) and _is_number(least) and bool(said >= least)
        return said in self.values if self.values else bool(said == self.value(config, layers))

    def shown(self, config: Mapping[str, Any], layers: int) -> str:
        """The value in words."""
        if self.least:
            return f"none, or at least {evaluated(self.least, config)}"
        if self.absent or self.present:
            return "a number" if self.present else "none"
        if self.repeat:
            return " and ".join(map(repr, self.repeat)) + " in turn" if len(self.repeat) < 4 else _turns(self.repeat)
        return repr(self.value(config, layers)) if not self.values else " or ".join(map(repr, self.values))


def _turns(values: tuple[Any, ...]) -> str:
    """`5 × 'sliding', 1 × 'full' in turn`."""
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return ", ".join(f"{count} × {value!r}" for count, value in runs) + " in turn"
