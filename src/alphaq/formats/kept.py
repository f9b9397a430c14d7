"""Matrices that stay 16 bits wide, as tensors of their own."""

from __future__ import annotations

import numpy as np

from alphaq.errors import ChoiceError
from alphaq.formats.base import Format, Written
from alphaq.nouns.choice import KEPT_BITS, Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix

KEPT = Choice(KEPT_BITS)


class Kept(Format):
    """Two bytes per weight: no codes, no groups."""

    name = "kept"
    examples = (str(KEPT),)

    def parse(self, written: Written) -> Choice | None:
        """'16' alone."""
        if written.bits != KEPT_BITS or written.ending:
            return None
        if written.group_size or written.signed:
            raise ChoiceError("A 16-bit choice has no group size and no symmetry: write it as '16'.")
        return KEPT

    def owns(self, choice: Choice) -> bool:
        """Whether it is '16'."""
        return choice.kept

    def choices(self) -> tuple[Choice, ...]:
        """The one."""
        return (KEPT,)

    def storage_bytes(self, choice: Choice, shape: Shape) -> int:
        """Two bytes per weight."""
        return 2 * shape[0] * shape[1]

    def restored(self, matrix: QuantizedMatrix, rows: slice) -> np.ndarray:
        """There are no codes to restore."""
        raise NotImplementedError


FORMAT = Kept()
