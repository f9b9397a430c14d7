"""The ways to store a matrix: one line per format, and what is asked of whichever has a choice."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, lru_cache
from importlib import import_module

from alphaq.errors import ChoiceError
from alphaq.formats.base import Format, Written
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.work.untrusted import shown

FORMATS = ("integers", "binary", "kept", "slim", "salient", "nested", "coded", "trellis", "ggml")
"""Modules of `alphaq.formats`, each with a FORMAT. They load when the first choice is read: starting stays light."""
USUAL_GROUP_SIZE = 128


@cache
def formats() -> tuple[Format, ...]:
    """All formats, in the order of the table."""
    return tuple(import_module(f"alphaq.formats.{name}").FORMAT for name in FORMATS)


@lru_cache(maxsize=4096)
def format_of(choice: Choice) -> Format:
    """The format that a choice is of. Raises ChoiceError if there is none."""
    found = next((one for one in formats() if one.owns(choice)), None)
    if found is None:
        raise ChoiceError(f"{choice!r} is of no format. Make choices with parse_choice or plain_choice.")
    return found


def parse_choice(text: str, group_size: int = USUAL_GROUP_SIZE, symmetric: bool = False) -> Choice:
    """Read '3', '3g64', '4g128s', '2g128-slim', '@2.75', '16' or 'Q4_K'. Raises ChoiceError for anything else.

    group_size, symmetric: what is meant where the text does not say.
    """
    if (choice := _read(Written.of(text, group_size, symmetric))) is not None:
        return choice
    examples = ", ".join(one.examples[0] for one in formats())
    raise ChoiceError(f"{shown(text)} is not a storage choice. Write bits alone (3), or like one of these: {examples}.")


def plain_choice(bits: int, group_size: int = USUAL_GROUP_SIZE, symmetric: bool = False) -> Choice:
    """The choice that bits alone mean; 16 is kept. Raises ChoiceError if they cannot be stored."""
    if (choice := _read(Written(str(bits), group_size, symmetric, bits))) is not None:
        return choice
    raise ChoiceError(f"{bits} bits cannot be stored. Available: 1 to 8, and 16 (kept).")


def _read(written: Written) -> Choice | None:
    return next((choice for one in formats() if (choice := one.parse(written)) is not None), None)


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Exact bytes of a stored matrix, header and padding included."""
    return format_of(choice).storage_bytes(choice, shape)


def stored_choice(choice: Choice) -> Choice:
    """The choice as files name it: without a rate."""
    return format_of(choice).stored(choice)


def code_bits(choice: Choice) -> float:
    """Bits per weight of a choice's codes: 2.25 of 't2.25'."""
    return format_of(choice).code_bits(choice)


def following(choices: Collection[Choice]) -> dict[Choice, tuple[Choice, Choice]]:
    """Choices whose errors follow from those of two others among the same, and which these are."""
    pairs = {choice: format_of(choice).between(choice) for choice in choices}
    return {choice: pair for choice, pair in pairs.items() if pair is not None and {*pair} <= {*choices}}


def rate_of(choice: Choice) -> float:
    """Bits per weight that codes are rounded for, to be entropy-coded; 0 of choices that are not."""
    return format_of(choice).rate(choice)
