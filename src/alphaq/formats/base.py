"""What a way to store matrices is: names, exact bytes, levels of codes, and the values that they stand for."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix

if TYPE_CHECKING:
    import numpy as np

_GRID = re.compile(r"(\d{1,2})(?:g(\d{1,4}))?(s)?(\W.*)?")


@dataclass(frozen=True)
class Written:
    """A choice as somebody wrote it: '4g128s-slim' has bits, a group size, a sign and an ending.

    bits: −1 where the text does not begin with any. group_size: None where none is written.
    """

    text: str
    usual_group_size: int
    usually_symmetric: bool
    bits: int = -1
    group_size: int | None = None
    signed: bool = False
    ending: str = ""

    @classmethod
    def of(cls, text: str, usual_group_size: int, usually_symmetric: bool) -> Written:
        """Cut a text into its parts, whatever they mean."""
        text = text.strip()
        if (match := _GRID.fullmatch(text)) is None:
            return cls(text, usual_group_size, usually_symmetric)
        bits, group_size, ending = int(match[1]), None if match[2] is None else int(match[2]), match[4] or ""
        return cls(text, usual_group_size, usually_symmetric, bits, group_size, match[3] is not None, ending)

    @property
    def grid(self) -> tuple[int, int, bool]:
        """Bits, group size and symmetry, the usual ones where nothing is written."""
        group_size = self.usual_group_size if self.group_size is None else self.group_size
        return self.bits, group_size, self.signed or self.usually_symmetric


@dataclass(frozen=True)
class Levels:
    """What a code q of one group stands for: ŵ = stretch·scale·(q − zero) + mean.

    This is the one place where it is written (`levels_of_bits`). zero holds where no zero point is stored, and the mean
    is 0 where none is. Kernels have it inline: `formats.kernels`, `quantizers.*kernels`, `runtime.integer_kernels`,
    `runtime.block_kernels`, `runtime.triton_kernels` and `runtime.lookup`; tests/formats/test_levels.py holds them
    against it.
    """

    zero: float
    stretch: float = 1.0


def levels_of_bits(bits: int, halves: bool = False) -> Levels:
    """Of codes of so many bits: mean ± scale for one, else whole steps, or odd halves of a step, about zero."""
    return Levels(0.5, 2.0) if bits == 1 else Levels(2.0 ** (bits - 1) - 0.5 * halves)


class Format(ABC):
    """A way to store matrices. Add one as a module with a `FORMAT` and a line in `formats.table.FORMATS`.

    name: of the module. examples: choices of it as they are written. foreign: whether another program finds and reads
    its codes. regroups: whether group size and symmetry are the user's to choose. graded: whether its choices differ
    in nothing but their rates. one_grid: whether all codes of a group lie on one grid, so that rounding can go by
    inputs. learnable: whether such grids can be learned too. streams: whether a row is one stream, which rounding can
    take through errors of earlier columns.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    foreign: ClassVar[bool] = False
    regroups: ClassVar[bool] = False
    graded: ClassVar[bool] = False
    one_grid: ClassVar[bool] = False
    learnable: ClassVar[bool] = False
    streams: ClassVar[bool] = False

    @abstractmethod
    def parse(self, written: Written) -> Choice | None:
        """The choice that is meant, None if it is another format's. Raises ChoiceError if it cannot be stored."""

    @abstractmethod
    def owns(self, choice: Choice) -> bool:
        """Whether a choice is of this format."""

    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """All that there are."""

    @abstractmethod
    def storage_bytes(self, choice: Choice, shape: Shape) -> int:
        """Exact bytes of a stored matrix."""

    @abstractmethod
    def restored(self, matrix: QuantizedMatrix, rows: slice) -> np.ndarray:
        """Values of some rows, float32 [rows, columns]."""

    def regrouped(self, choice: Choice, group_size: int, symmetric: bool) -> Choice:
        """The same with another group size and symmetry, where that makes a difference. Raises ChoiceError."""
        return choice

    def stored(self, choice: Choice) -> Choice:
        """What the file calls it."""
        return choice

    def code_bits(self, choice: Choice) -> float:
        """Bits per weight of its codes, nominal where codes differ."""
        return choice.bits

    def rate(self, choice: Choice) -> float:
        """Bits per weight that its codes are rounded for, to be entropy-coded; 0 if that does not matter."""
        return 0.0

    def slow(self, choice: Choice) -> bool:
        """Whether finding its codes takes several times as long as those of others of its width."""
        return False

    def between(self, choice: Choice) -> tuple[Choice, Choice] | None:
        """The two choices between whose errors its own lie where these are measured, or None if nothing tells."""
        return None

    def narrower(self, choice: Choice) -> tuple[Choice, ...]:
        """Other choices whose codes are the first bits of these, so that a matrix can be cut down to them."""
        return ()
