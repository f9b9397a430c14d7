"""The name of one way to store a matrix."""

from __future__ import annotations

from dataclasses import dataclass

KEPT_BITS = 16


@dataclass(frozen=True, order=True)
class Choice:
    """The name of one way to store a matrix; what it means is its format's to say (`formats.table.format_of`).

    bits: of a code, nominal where codes differ. group_size: columns that share a scale, 0 if there are no scales.
    symmetric: whether no offsets are stored. name: as it is written, where that is more than a grid: '4g128-nest',
    'Q4_K'. Formats make choices and check them (`parse_choice`, `plain_choice`).
    """

    bits: int
    group_size: int = 0
    symmetric: bool = False
    name: str = ""

    def __str__(self) -> str:
        if self.name or self.kept:
            return self.name or str(self.bits)
        return f"{self.bits}g{self.group_size}{'s' * self.symmetric}"

    @property
    def kept(self) -> bool:
        """Whether weights stay 16 bits wide."""
        return self.bits == KEPT_BITS

    def groups(self, columns: int) -> int:
        """Groups per row; the last may be ragged."""
        return -(-columns // self.group_size)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's packed codes: whole 32-bit words."""
        return 4 * -(-columns * self.bits // 32)
