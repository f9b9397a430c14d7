"""Codes that can be cut down: the first bits of a code are the code of every narrower width.

Levels lie at odd halves of a step, ŵ = s·(q − 2^(b−1) + ½). Between two neighbours then lies a level of the grid with
twice the step, which dropping the last bit of q leads to (D²MoE, arXiv 2504.15299).
"""

from __future__ import annotations

from typing import ClassVar

from alphaq.errors import ChoiceError
from alphaq.formats.native import CHOICE_BITS, GROUP_SIZES, NativeFormat
from alphaq.nouns.choice import Choice


class Nested(NativeFormat):
    """Nested codes, '4g128-nest': symmetric, though their names do not say so."""

    name = "nested"
    examples = ("4g128-nest", "2g32-nest")
    widths = CHOICE_BITS[1:]
    kinds: ClassVar[dict[str, int]] = {"nest": 5}
    halves = True
    one_grid = True
    fused = True
    looked_up = True

    def choices(self) -> tuple[Choice, ...]:
        """All widths in all group sizes."""
        return tuple(self.make(bits, group_size) for bits in self.widths for group_size in GROUP_SIZES)

    def make(self, bits: int, group_size: int, symmetric: bool = True, kind: str = "nest") -> Choice:
        """A choice of nested codes, which have no zero points whatever was asked for."""
        choice = Choice(bits, group_size, True, f"{bits}g{group_size}-{kind}")
        self.check(choice)
        return choice

    def check(self, choice: Choice) -> None:
        """Also refuse 1 bit, of which nothing is left when it is cut."""
        if choice.bits == 1:
            raise ChoiceError("Nested codes have 2 to 8 bits and no zero points. Write for example 4g128-nest.")
        super().check(choice)

    def of_header(self, number: int, bits: int, group_size: int, symmetric: bool) -> Choice | None:
        """None also if the header tells of zero points."""
        return super().of_header(number, bits, group_size, symmetric) if symmetric else None

    def narrower(self, choice: Choice) -> tuple[Choice, ...]:
        """Nested codes of fewer bits, and signs."""
        cut = (self.make(bits, choice.group_size) for bits in self.widths if bits < choice.bits)
        return (Choice(1, choice.group_size, symmetric=True), *cut)


FORMAT = Nested()
