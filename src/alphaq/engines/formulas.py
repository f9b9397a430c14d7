"""Values of a config by name: `rope_parameters.factor`, or a formula such as `hidden_size / num_attention_heads`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def evaluated(formula: str, config: Mapping[str, Any]) -> Any:
    """A config value, or a formula of several and numbers, from left to right; None if one of them is missing."""
    first, *rest = formula.split(" ")
    value = looked_up(first, config)
    for operator, name in zip(rest[::2], rest[1::2], strict=True):
        other = looked_up(name, config)
        if not (_is_number(value) and _is_number(other)) or (operator == "/" and other == 0):
            return None
        value = value + other if operator == "+" else value * other if operator == "*" else value // other
    return value


def looked_up(name: str, config: Mapping[str, Any]) -> Any:
    """The number that a name is, or the value under a key, with dots deeper; None if there is none."""
    if name[0].isdigit():
        return float(name)
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def names_in(formula: str) -> list[str]:
    """The config keys that a formula reads."""
    return [name for name in formula.split(" ")[::2] if not name[0].isdigit()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
