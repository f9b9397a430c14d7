"""One way to store a matrix."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from alphaq.errors import ChoiceError
from alphaq.nouns.ggml import GGML_BLOCKS
from alphaq.nouns.matrix import Shape
from alphaq.work.untrusted import shown

BLOCK_HEADER_BYTES = 16
BLOCK_ALIGNMENT = 16
CHOICE_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (32, 64, 128)
MIXES = ("", "slim", "pb2", "pb4", "pb8", "nest")  # a block's flags hold the place in this list
SLIM_BITS = (2, 3, 4, 5, 6, 7)
CODECS = ("none", "zstd")  # a coded tensor's header holds the place in this list


@dataclass(frozen=True, order=True)
class Choice:
    """One way to store a matrix: `bits` per code, one scale (and offset) per `group_size` columns.

    bits 16 means "kept": two bytes per weight, no group. A symmetric choice stores no offsets; an
    asymmetric one stores a `bits`-wide zero point per group, or a 16-bit mean if bits is 1. A `scheme`
    names a storage type that is not plain integers (llama.cpp's Q4_K, IQ2_S, …); bits are then nominal
    and the group is its block. How many bytes a choice takes is the engine profile's to say.

    A `mix` varies widths within the matrix. "slim": a group has bits − 1, bits or bits + 1, as many groups the one as
    the other. "pb2", "pb4", "pb8": up to so many weights of each group have 8 bits, the others the one of `bits`.

    "nest" varies nothing: levels lie at odd halves of a step, so that the top bits of a code are codes too.

    A `rate` is of codes that will be entropy-coded: bits per weight, less than `bits`, that Gaussian weights will take.
    It decides the step; what is stored is the symmetric choice without it.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = False
    scheme: str = ""
    mix: str = ""
    rate: float = 0.0

    def __post_init__(self) -> None:
        if self.mix:
            self._check_mix()
        if self.rate and (self.mix or self.scheme or not self.symmetric or not 0 < self.rate < self.bits <= 8):
            raise ChoiceError(
                f"A rate of {self.rate:g} bits needs plain symmetric codes that are wider. Write for example @2.75, or "
                "4g128s@2.75 with the bits that it takes in memory."
            )
        if self.scheme:
            if GGML_BLOCKS.get(self.scheme, ())[:2] != (self.bits, self.group_size) or self.symmetric:
                raise ChoiceError(f"{self.scheme!r} is no storage type with {self.bits} bits. Write only its name.")
        elif self.bits == 16:
            if self.group_size or self.symmetric:
                raise ChoiceError("A 16-bit choice has no group size and no symmetry: write it as '16'.")
        elif self.bits not in CHOICE_BITS:
            raise ChoiceError(f"{self.bits} bits cannot be stored. Available: 1 to 8, and 16 (kept).")
        elif self.group_size not in GROUP_SIZES:
            raise ChoiceError(f"Group size {self.group_size} cannot be stored. Available: 32, 64, 128.")

    def _check_mix(self) -> None:
        if self.mix not in MIXES:
            raise ChoiceError(f"{shown(self.mix)} is no mix of widths. Available: {', '.join(MIXES[1:])}.")
        if self.scheme or self.bits == 16:
            raise ChoiceError(f"{self.scheme or 16} has no widths to mix. Write for example 2g128-slim.")
        if self.nested:
            if self.bits == 1 or not self.symmetric:
                raise ChoiceError("Nested codes have 2 to 8 bits and no zero points. Write for example 4g128-nest.")
            return
        if self.salient and self.bits != 1:
            raise ChoiceError(f"-{self.mix} is 8-bit weights over a rest of 1 bit. Write 1-{self.mix}, not {self}.")
        if not self.salient and self.bits not in SLIM_BITS:
            raise ChoiceError(f"{self} needs groups of a bit less and more. Available: 2-slim to 7-slim.")

    @classmethod
    def parse(cls, text: str, default_group_size: int = 128, symmetric: bool = False) -> Choice:
        """Read '3', '3g64', '4g128s', '2g128-slim', '16' or 'Q4_K'. Raises ChoiceError for anything else."""
        name = text.strip().upper()
        if name in GGML_BLOCKS:
            return cls(*GGML_BLOCKS[name][:2], scheme=name)
        if match := re.fullmatch(r"@(\d(?:\.\d{1,3})?)", text.strip()):
            rate = float(match[1])
            if not rate:
                raise ChoiceError("A rate of 0 bits stores nothing. Write for example @1.")
            return cls(min(8, math.ceil(rate) + 1), default_group_size, True, rate=rate)
        match = re.fullmatch(r"(\d{1,2})(?:g(\d{1,4}))?(s)?(?:-([a-z]{1,8}\d?))?(?:@(\d(?:\.\d{1,3})?))?", text.strip())
        if match is None:
            raise ChoiceError(
                f"{shown(text)} is not a storage choice. Write bits, bits and a group size, or a ggml type: "
                "3, 3g64, 4g128s, 2g128-slim, 1g128-pb8, @2.75, 16, Q4_K."
            )
        bits, mix, rate = int(match[1]), match[4] or "", float(match[5] or 0)
        symmetric = symmetric or mix == "nest"
        if bits == 16:
            return cls(16, int(match[2] or 0), match[3] is not None, mix=mix, rate=rate)
        return cls(bits, int(match[2] or default_group_size), match[3] is not None or symmetric, mix=mix, rate=rate)

    def __str__(self) -> str:
        if self.scheme:
            return self.scheme
        mix = f"-{self.mix}" if self.mix else f"@{self.rate:g}" if self.rate else ""
        return (
            "16"
            if self.bits == 16
            else f"{self.bits}g{self.group_size}{'s' * (self.symmetric and not self.nested)}{mix}"
        )

    @property
    def kept(self) -> bool:
        """Whether weights stay 16 bits wide."""
        return self.bits == 16

    @property
    def nested(self) -> bool:
        """Whether the top bits of codes are codes."""
        return self.mix == "nest"

    @property
    def slim(self) -> bool:
        """Whether groups differ in their bits."""
        return self.mix == "slim"

    @property
    def stored(self) -> Choice:
        """The choice as a block names it."""
        return replace(self, rate=0.0) if self.rate else self

    @property
    def salient(self) -> int:
        """Weights of a group that may have 8 bits."""
        return int(self.mix[2:]) if self.mix.startswith("pb") else 0

    def groups(self, columns: int) -> int:
        """Groups per row; the last may be ragged."""
        return -(-columns // self.group_size)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's packed codes: whole 32-bit words."""
        return 4 * -(-columns * self.bits // 32)

    def parts(self, shape: Shape) -> tuple[int, int, int]:
        """Bytes of codes, offsets and scales of a packed matrix (see docs/formats.md)."""
        rows, columns = shape
        groups = self.groups(columns)
        codes = rows * self.row_bytes(columns)
        if self.symmetric:
            offsets = 0
        elif self.bits == 1:
            offsets = 2 * rows * groups
        elif self.slim:
            offsets = 4 * groups * self.bits * -(-rows // 32)  # whole words at every width
        else:
            offsets = 4 * groups * -(-rows * self.bits // 32)
        return codes, offsets, 2 * rows * groups

    def mix_bytes(self, shape: Shape) -> int:
        """Bytes after the scales: the width of each group, or the salient weights. 0 without a mix."""
        groups = self.groups(shape[1])
        if self.salient:
            return shape[0] * groups * (2 + 2 * self.salient)
        return groups if self.slim else 0

    def storage_bytes(self, shape: Shape) -> int:
        """Exact bytes of the stored tensor: header, codes, zero points, scales and padding included."""
        if self.bits == 16:
            return 2 * shape[0] * shape[1]
        size = BLOCK_HEADER_BYTES + sum(self.parts(shape)) + self.mix_bytes(shape)
        return -(-size // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
