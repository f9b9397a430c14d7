"""Storage types of llama.cpp: how many weights share a block, and how many bytes a block takes.

llama.cpp's own code finds and reads what is inside. Source: the constants of the `gguf` package (GGML_QUANT_SIZES) and
what the installed library says of itself; tests compare both. Rows must be whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alphaq.formats.base import Format, Written
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix

GGML_BLOCKS: dict[str, tuple[int, int, int]] = {
    # name: (bits in the name, weights per block, bytes per block)
    "IQ1_S": (1, 256, 50),
    "IQ1_M": (1, 256, 56),
    "Q1_0": (1, 128, 18),
    "TQ1_0": (1, 256, 54),
    "IQ2_XXS": (2, 256, 66),
    "IQ2_XS": (2, 256, 74),
    "IQ2_S": (2, 256, 82),
    "Q2_K": (2, 256, 84),
    "Q2_0": (2, 64, 18),
    "TQ2_0": (2, 256, 66),
    "IQ3_XXS": (3, 256, 98),
    "IQ3_S": (3, 256, 110),
    "Q3_K": (3, 256, 110),
    "IQ4_XS": (4, 256, 136),
    "IQ4_NL": (4, 32, 18),
    "MXFP4": (4, 32, 17),
    "NVFP4": (4, 64, 36),
    "Q4_0": (4, 32, 18),
    "Q4_1": (4, 32, 20),
    "Q4_K": (4, 256, 144),
    "Q5_0": (5, 32, 22),
    "Q5_1": (5, 32, 24),
    "Q5_K": (5, 256, 176),
    "Q6_K": (6, 256, 210),
    "Q8_0": (8, 32, 34),
}
"""The types on offer as choices."""

SHORTEST_BLOCK = min(weights for _, weights, _ in GGML_BLOCKS.values())
"""A row of no multiple of it fits no type."""


class GgmlType(NamedTuple):
    """How a type is stored. number: what stands for it in files."""

    number: int
    block_weights: int
    block_bytes: int

    def storage_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor [..., columns], unpadded; its rows must be whole blocks."""
        return math.prod(shape) // self.block_weights * self.block_bytes


_NUMBERS_OF_CHOICES = {
    "IQ1_S": 19,
    "IQ1_M": 29,
    "Q1_0": 41,
    "TQ1_0": 34,
    "IQ2_XXS": 16,
    "IQ2_XS": 17,
    "IQ2_S": 22,
    "Q2_K": 10,
    "Q2_0": 42,
    "TQ2_0": 35,
    "IQ3_XXS": 18,
    "IQ3_S": 21,
    "Q3_K": 11,
    "IQ4_XS": 23,
    "IQ4_NL": 20,
    "MXFP4": 39,
    "NVFP4": 40,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q4_K": 12,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q5_K": 13,
    "Q6_K": 14,
    "Q8_0": 8,
}

GGML_TYPES: dict[str, GgmlType] = {
    "F32": GgmlType(0, 1, 4),
    "F16": GgmlType(1, 1, 2),
    "BF16": GgmlType(30, 1, 2),
    "F64": GgmlType(28, 1, 8),
    "I8": GgmlType(24, 1, 1),
    "I16": GgmlType(25, 1, 2),
    "I32": GgmlType(26, 1, 4),
    "I64": GgmlType(27, 1, 8),
    "Q8_1": GgmlType(9, 32, 40),
    "Q8_K": GgmlType(15, 256, 292),
} | {name: GgmlType(number, *GGML_BLOCKS[name][1:]) for name, number in _NUMBERS_OF_CHOICES.items()}
"""Every type that a file may hold."""


class Ggml(Format):
    """One of llama.cpp's types, 'Q4_K'. Of a matrix there are only codes: uint8 [rows, bytes per row]."""

    name = "ggml"
    examples = ("Q4_K", "IQ2_S")
    foreign = True

    def parse(self, written: Written) -> Choice | None:
        """The name of a type, in any case."""
        name = written.text.upper()
        return Choice(*GGML_BLOCKS[name][:2], name=name) if name in GGML_BLOCKS else None

    def owns(self, choice: Choice) -> bool:
        """Whether it is the name of a type."""
        return choice.name in GGML_BLOCKS

    def choices(self) -> tuple[Choice, ...]:
        """All types on offer."""
        return tuple(Choice(bits, weights, name=name) for name, (bits, weights, _) in GGML_BLOCKS.items())

    def slow(self, choice: Choice) -> bool:
        """Those whose codes are searched for on a lattice, 1 to 5 million weights a second; others take 7 to 130."""
        return choice.name.startswith("IQ")

    def storage_bytes(self, choice: Choice, shape: Shape) -> int:
        """Unpadded; rows must be whole blocks."""
        return shape[0] * (shape[1] // choice.group_size) * GGML_BLOCKS[choice.name][2]

    def restored(self, matrix: QuantizedMatrix, rows: slice) -> np.ndarray:
        """By llama.cpp's own code."""
        from alphaq.formats.ggml_library import restore_rows  # which a plain install leaves out

        return restore_rows(matrix.codes[rows].numpy(), matrix.choice.name, matrix.shape[1])


FORMAT = Ggml()
