"""Integers with one step to a matrix, rounded for a rate: '@2.75' takes 2.75 bits per Gaussian weight once coded.

The rate decides the step; what is stored is the symmetric integers without it, which `formats.coding` makes smaller.
"""

from __future__ import annotations

import math
import re
from typing import ClassVar

from alphaq.errors import ChoiceError
from alphaq.formats.base import Written
from alphaq.formats.integers import Integers
from alphaq.nouns.choice import Choice

_RATE = re.compile(r"@(\d(?:\.\d{1,3})?)")
_WIDEST = 8
_QUARTERS = range(4, 25)  # rates on offer, in quarters of a bit


class Coded(Integers):
    """Integers for entropy-coded files, '@2.75' or '4g128s@2.75'."""

    name = "coded"
    examples: ClassVar[tuple[str, ...]] = ("@2.75", "4g128s@2.75")
    kinds: ClassVar[dict[str, int]] = {}

    def parse(self, written: Written) -> Choice | None:
        """A rate, behind the grid that its codes take in memory or alone."""
        if match := _RATE.fullmatch(written.text):
            if not (rate := float(match[1])):
                raise ChoiceError("A rate of 0 bits stores nothing. Write for example @1.")
            return self._at(min(_WIDEST, math.ceil(rate) + 1), written.usual_group_size, True, rate)
        match = _RATE.fullmatch(written.ending)
        return self._at(*written.grid, float(match[1])) if match else None

    def owns(self, choice: Choice) -> bool:
        """Whether it names a rate."""
        return "@" in choice.name

    def choices(self) -> tuple[Choice, ...]:
        """1 to 6 bits per weight in quarters, in the usual groups."""
        found = (self.parse(Written(f"@{quarters / 4}", 128, False)) for quarters in _QUARTERS)
        return tuple(choice for choice in found if choice)

    def _at(self, bits: int, group_size: int, symmetric: bool, rate: float) -> Choice:
        if not symmetric or not 0 < rate < bits <= _WIDEST:
            raise ChoiceError(
                f"A rate of {rate:g} bits needs plain symmetric codes that are wider. Write for example @2.75, or "
                "4g128s@2.75 with the bits that it takes in memory."
            )
        plain = self.make(bits, group_size, symmetric)
        return Choice(bits, group_size, symmetric, f"{plain}@{rate:g}")

    def regrouped(self, choice: Choice, group_size: int, symmetric: bool) -> Choice:
        """The same rate in another grid."""
        return self._at(choice.bits, group_size, symmetric, self.rate(choice))

    def stored(self, choice: Choice) -> Choice:
        """The integers."""
        return Choice(choice.bits, choice.group_size, choice.symmetric)

    def kind_number(self, choice: Choice) -> int:
        """That of integers."""
        return Integers.kinds[""]

    def rate(self, choice: Choice) -> float:
        """Bits per weight that Gaussian weights will take."""
        return float(choice.name.partition("@")[2])


FORMAT = Coded()
