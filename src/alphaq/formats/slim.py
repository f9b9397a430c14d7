"""Groups of columns that differ in their bits: b − 1, b or b + 1, as many the one as the other (SliM-LLM, 2405.14917).

Groups lie one after the other in a row. The extra part has the bits of each group. Groups of 1 bit have no mean, and 0
in the place of a zero point; zero points of each group are whole words, whatever its bits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from alphaq.errors import CheckpointError, ChoiceError
from alphaq.formats.base import levels_of_bits
from alphaq.formats.native import NativeFormat, floats
from alphaq.formats.packing import pack, unpack
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix


class Slim(NativeFormat):
    """Bits by group, '2g128-slim'. A matrix' `extra` is its widths: uint8 [groups]."""

    name = "slim"
    examples = ("2g128-slim", "3g32s-slim")
    widths = (2, 3, 4, 5, 6, 7)
    kinds: ClassVar[dict[str, int]] = {"slim": 1}
    looked_up = True

    def check(self, choice: Choice) -> None:
        """Also refuse bits without a width on either side."""
        if choice.bits not in self.widths:
            raise ChoiceError(f"{choice} needs groups of a bit less and more. Available: 2-slim to 7-slim.")
        super().check(choice)

    def zero_point_bytes(self, choice: Choice, shape: Shape) -> int:
        """Whole words at every width."""
        return 4 * choice.groups(shape[1]) * choice.bits * -(-shape[0] // 32)

    def extra_bytes(self, choice: Choice, shape: Shape) -> int:
        """The bits of each group."""
        return choice.groups(shape[1])

    def packed_zero_points(self, matrix: QuantizedMatrix) -> np.ndarray:
        """Those of each group in its own bits."""
        assert matrix.offsets is not None and matrix.extra is not None  # the caller knows
        padded = np.pad(matrix.offsets.numpy().T, ((0, 0), (0, -matrix.shape[0] % 32)))
        widths = matrix.extra.tolist()
        return np.concatenate([pack(row[None], bits)[0] for row, bits in zip(padded, widths, strict=True)])

    def unpacked_zero_points(self, part: np.ndarray, choice: Choice, shape: Shape, extra: Any) -> np.ndarray:
        """Groups of 1 bit have none, whatever a file says."""
        rows = shape[0]
        ends = np.cumsum(4 * -(-rows // 32) * extra.astype(np.int64))
        pieces = zip(np.split(part, ends[:-1]), extra.tolist(), strict=True)
        found: np.ndarray = np.stack([unpack(piece[None], bits, rows)[0] for piece, bits in pieces], axis=1)
        return found * (extra > 1)

    def written_extra(self, matrix: QuantizedMatrix) -> tuple[np.ndarray, ...]:
        """Widths."""
        assert matrix.extra is not None  # of this format
        return (matrix.extra,)

    def read_extra(self, part: np.ndarray, choice: Choice, shape: Shape, name: str) -> np.ndarray:
        """Bits of each group, which must be as many in all as if none differed."""
        steps = part.astype(np.int64) - choice.bits
        ragged = shape[1] % choice.group_size != 0
        if abs(steps).max() > 1 or steps.sum() != 0 or (ragged and steps[-1] != 0):
            raise CheckpointError(
                f"{name} has groups of {sorted(set(part.tolist()))} bits, which {choice} cannot have in such numbers. "
                "Quantize the model again."
            )
        return part.copy()

    def zeros(self, matrix: QuantizedMatrix) -> np.ndarray:
        """By the bits of each group."""
        assert matrix.extra is not None  # of this format
        widths = matrix.extra.tolist()
        return np.array([0.0 if bits == 1 else levels_of_bits(bits).zero for bits in widths], np.float32)

    def fill(self, matrix: QuantizedMatrix, rows: slice, zeros: np.ndarray, out: np.ndarray) -> None:
        """Each group from its own bits."""
        from alphaq.formats.kernels import dequantize_widths  # numba, which names and sizes do not need

        assert matrix.extra is not None  # of this format
        codes, scales = matrix.codes[rows].numpy().reshape(-1), floats(matrix.scales, rows)
        dequantize_widths(codes, matrix.shape[1], matrix.extra, matrix.choice.group_size, scales, zeros, out)


FORMAT = Slim()
