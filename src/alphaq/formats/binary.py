"""One bit per weight: ŵ = mean ± s, the mean being 0 where it is not stored."""

from __future__ import annotations

from alphaq.formats.base import Written
from alphaq.formats.native import NativeFormat
from alphaq.nouns.choice import Choice


class Binary(NativeFormat):
    """Signs about a mean, '1g128' or '1g64s'."""

    name = "binary"
    examples = ("1g128", "1g64s")
    widths = (1,)
    means = True
    one_grid = True
    learnable = True
    fused = True
    looked_up = True

    def parse(self, written: Written) -> Choice | None:
        """A grid of 1 bit."""
        return self.make(*written.grid) if written.bits == 1 and not written.ending else None

    def owns(self, choice: Choice) -> bool:
        """Whether it is a plain grid of 1 bit."""
        return not choice.name and choice.bits == 1


FORMAT = Binary()
