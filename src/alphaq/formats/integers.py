"""Whole numbers of 2 to 8 bits on a uniform grid per group: ŵ = s·(q − z), z stored or the middle."""

from __future__ import annotations

from typing import ClassVar

from alphaq.formats.base import Written
from alphaq.formats.native import CHOICE_BITS, NativeFormat
from alphaq.nouns.choice import KEPT_BITS, Choice


class Integers(NativeFormat):
    """Plain integers, '3g64' or '4g128s'."""

    name = "integers"
    examples: ClassVar[tuple[str, ...]] = ("3g64", "4g128s", "3")
    widths = CHOICE_BITS[1:]
    one_grid = True
    learnable = True
    fused = True
    looked_up = True

    def parse(self, written: Written) -> Choice | None:
        """A grid alone, of any bits that no other format takes."""
        if written.bits in (-1, 1, KEPT_BITS) or written.ending:
            return None
        return self.make(*written.grid)

    def owns(self, choice: Choice) -> bool:
        """Whether it is a plain grid of several bits."""
        return not choice.name and choice.bits not in (1, KEPT_BITS)


FORMAT = Integers()
