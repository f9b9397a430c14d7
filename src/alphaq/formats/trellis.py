"""Trellis codes: quarters of a bit per weight, each value told by the last ten bits of its row's stream.

A row is one stream of bits. Weight i adds the bits [e(i − 1), e(i)), e(i) = ⌊(i + 1)·r/4⌋ at r quarters of a bit; its
state x is the ten bits that end at e(i), the newest highest, zeros where they lie before the row, and

    ŵ = scale·LEVELS[p/8]/128,   p = x·(LINEAR + SQUARE·x)  mod 1024.

So neighbours share bits, and a path through the states has far more values to choose from than its bits could name one
weight at a time (QTIP, arXiv 2406.11235). SQUARE is even and LINEAR odd, hence p is a permutation of the states: all
levels occur equally often, at the quantiles of Gaussian weights, and the states that may follow one another lie far
apart. Found by search: at ten bits of state it leaves as little as hashes do at thirteen (docs/research/log.md).
"""

from __future__ import annotations

import re
from functools import cache
from typing import ClassVar

import numpy as np

from alphaq.errors import ChoiceError
from alphaq.formats.base import Levels, Written
from alphaq.formats.native import NativeFormat, Parts, floats
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix

STATE_BITS = 10
LINEAR, SQUARE = 775, 990
_UPPER = (
    *(0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14, 15, 16, 17, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27),
    *(28, 29, 30, 31, 32, 33, 35, 36, 37, 38, 39, 41, 42, 43, 45, 46, 48, 50, 51, 53, 55, 57, 59, 61, 64, 66, 69, 73),
    *(77, 82, 89, 100, 127),
)
_SORTED = np.array([*(-level for level in reversed(_UPPER)), *_UPPER], np.int8)
LEVELS = np.roll(_SORTED, -106)  # so that rows, which begin in state 0, do not begin with outliers
"""Means of 128 equally likely parts of a Gaussian, the outermost moved out to 3σ; turned."""
UNIT = 2.0**-7  # of a level: scales then lie well within float16
WHOLE_ROW = 65535  # the largest group that a header can state
_RATE = re.compile(r"t(\d{1,2})(\.\d{1,3})?")
_LOWEST, _HIGHEST = 4, 16  # rates, in quarters of a bit


class Trellis(NativeFormat):
    """Trellis codes with one scale for each row, 't2' or 't2.25'. bits of a choice: whole bits of its rate.

    kinds: fractions of the rate. A row of more than 65535 columns has a scale for each 65535 of them.
    """

    name = "trellis"
    examples = ("t2", "t2.25", "t1.5", "t3.75")
    widths = (1, 2, 3, 4)
    kinds: ClassVar[dict[str, int]] = {"": 7, ".25": 8, ".5": 9, ".75": 10}
    regroups = False
    graded = True
    streams = True
    fused = True
    looked_up = True

    def parse(self, written: Written) -> Choice | None:
        """A t and a rate of 1 to 4 bits in quarters."""
        if (match := _RATE.fullmatch(written.text)) is None:
            return None
        rate = float(match[1] + (match[2] or ""))
        if not (_LOWEST <= 4 * rate <= _HIGHEST and (4 * rate).is_integer()):
            raise ChoiceError(f"Trellis codes have 1 to 4 bits in quarters, not {rate:g}. Write for example t2.25.")
        return of_quarters(int(4 * rate))

    def owns(self, choice: Choice) -> bool:
        """Whether it is the name of a rate."""
        return choice.name.startswith("t")

    def choices(self) -> tuple[Choice, ...]:
        """All rates."""
        return tuple(of_quarters(quarters) for quarters in range(_LOWEST, _HIGHEST + 1))

    def regrouped(self, choice: Choice, group_size: int, symmetric: bool) -> Choice:
        """The same: it has no groups."""
        return choice

    def kind_number(self, choice: Choice) -> int:
        """That of its fraction."""
        return self.kinds[choice.name[2:]]

    def of_header(self, number: int, bits: int, group_size: int, symmetric: bool) -> Choice | None:
        """The rate that a header names."""
        if number not in self.kinds.values():
            return None
        quarters = 4 * bits + number - self.kinds[""]
        known = _LOWEST <= quarters <= _HIGHEST and group_size == WHOLE_ROW and symmetric
        return of_quarters(quarters) if known else None

    def quarters(self, choice: Choice) -> int:
        """Quarters of a bit per weight, 4 to 16."""
        return round(4 * float(choice.name[1:]))

    def code_bits(self, choice: Choice) -> float:
        """Its rate; whole ones are integers, as those of all formats."""
        whole, more = divmod(self.quarters(choice), 4)
        return whole + more / 4 if more else whole

    def row_bytes(self, choice: Choice, columns: int) -> int:
        """Bytes of a row's stream: whole 32-bit words."""
        return 4 * -(-(columns * self.quarters(choice) // 4) // 32)

    def between(self, choice: Choice) -> tuple[Choice, Choice] | None:
        """The whole rates around a fraction."""
        whole, more = divmod(self.quarters(choice), 4)
        return (of_quarters(4 * whole), of_quarters(4 * whole + 4)) if more else None

    def symbol_bits(self, choice: Choice) -> int:
        """Bytes: every stream looks random."""
        return 8

    def parts(self, choice: Choice, shape: Shape) -> Parts:
        """Streams and scales."""
        rows, columns = shape
        return Parts(rows * self.row_bytes(choice, columns), 0, 2 * rows * choice.groups(columns), 0)

    def levels(self, choice: Choice) -> Levels:
        """None: codes are no levels of their own."""
        raise ChoiceError(f"{choice} has no level for each code.")

    def restored(self, matrix: QuantizedMatrix, rows: slice) -> np.ndarray:
        """ŵ of some rows, float32 [rows, columns]."""
        from alphaq.formats.trellis_kernels import restore_rows  # numba, which names and sizes do not need

        codes = np.ascontiguousarray(matrix.codes[rows].numpy())
        scales = floats(matrix.scales, rows) * np.float32(UNIT)
        values = np.empty((len(codes), matrix.shape[1]), np.float32)
        quarters = self.quarters(matrix.choice)
        restore_rows(
            codes.reshape(-1), matrix.shape[1], quarters, state_levels(), WHOLE_ROW, scales, values.reshape(-1)
        )
        return values


def of_quarters(quarters: int) -> Choice:
    """The choice of a rate in quarters of a bit."""
    return Choice(quarters // 4, WHOLE_ROW, symmetric=True, name=f"t{quarters / 4:g}")


@cache
def state_levels() -> np.ndarray:
    """The level of each state, int8 [1024]."""
    states = np.arange(1 << STATE_BITS)
    return LEVELS[states * (LINEAR + SQUARE * states) % len(states) * len(LEVELS) >> STATE_BITS]


FORMAT = Trellis()
