"""Formats of the native block: everything one quantized matrix needs, in one uint8 tensor.

    header (16 bytes) | codes | zero points or means | scales | extra | padding to a multiple of 16

Codes are packed least significant bit first along a row, rows padded to whole 32-bit words, so 32 codes of b bits are
exactly b words. Zero points are packed the same way along the rows of their transpose. What a format stores beside
comes after the scales. One tensor per matrix keeps an expert contiguous on disk and its name unchanged, and the header
makes a block decodable without any other file. Layout: docs/formats.md.
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar, NamedTuple

import numpy as np

from alphaq.errors import CheckpointError, ChoiceError
from alphaq.formats.base import Format, Levels, Written, levels_of_bits
from alphaq.formats.packing import pack, unpack
from alphaq.nouns.choice import KEPT_BITS, Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix

HEADER = struct.Struct("<2sBBHHII")  # magic, version, bits, group size, flags, rows, columns
HEADER_BYTES = HEADER.size
ALIGNMENT_BYTES = 16
CHOICE_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (32, 64, 128)


class Parts(NamedTuple):
    """Bytes of the parts of a block, between header and padding."""

    codes: int
    offsets: int
    scales: int
    extra: int


class NativeFormat(Format):
    """Codes in groups that share a scale, in a native block.

    widths: bits that its choices may have. kinds: what follows the grid in a choice's name ('' for nothing) → the
    number that stands for it in headers. means: whether offsets are float16 means instead of packed zero points.
    halves: whether levels are odd halves of a step. fused: whether the kernels of all devices multiply with its codes;
    if not, rows are restored on the CPU. looked_up: whether `runtime.lookup` finds rows in it, as an embedding needs;
    if not, the whole matrix is restored for that.
    """

    widths: ClassVar[tuple[int, ...]]
    kinds: ClassVar[dict[str, int]] = {"": 0}
    means: ClassVar[bool] = False
    halves: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    looked_up: ClassVar[bool] = False
    regroups = True

    # -- names --------------------------------------------------------------------------------------

    def parse(self, written: Written) -> Choice | None:
        """A grid and one of the format's kinds."""
        kind = written.ending.removeprefix("-")
        if not kind or kind not in self.kinds:
            return None
        if written.bits == KEPT_BITS:
            raise ChoiceError(f"16 has no widths to mix. Write for example {self.examples[0]}.")
        return self.make(*written.grid, kind)

    def owns(self, choice: Choice) -> bool:
        """Whether its name has one of the format's kinds."""
        return bool(choice.name) and kind_of(choice) in self.kinds

    def choices(self) -> tuple[Choice, ...]:
        """All widths in all group sizes, without and with symmetry."""
        return tuple(
            self.make(bits, group_size, symmetric, kind)
            for symmetric in (False, True)
            for bits in self.widths
            for group_size in GROUP_SIZES
            for kind in self.kinds
        )

    def make(self, bits: int, group_size: int, symmetric: bool, kind: str = "") -> Choice:
        """A choice of this format. Raises ChoiceError if it cannot be stored."""
        plain = Choice(bits, group_size, symmetric)
        choice = Choice(bits, group_size, symmetric, f"{plain}-{kind}" if kind else "")
        self.check(choice)
        return choice

    def check(self, choice: Choice) -> None:
        """Raise ChoiceError for bits and groups that cannot be stored."""
        if choice.bits not in CHOICE_BITS:
            raise ChoiceError(f"{choice.bits} bits cannot be stored. Available: 1 to 8, and 16 (kept).")
        if choice.group_size not in GROUP_SIZES:
            raise ChoiceError(f"Group size {choice.group_size} cannot be stored. Available: 32, 64, 128.")

    def regrouped(self, choice: Choice, group_size: int, symmetric: bool) -> Choice:
        """The same bits and kind in another grid."""
        return self.make(choice.bits, group_size, symmetric, kind_of(choice))

    # -- bytes --------------------------------------------------------------------------------------

    def parts(self, choice: Choice, shape: Shape) -> Parts:
        """Bytes of codes, offsets, scales and the rest."""
        rows, groups = shape[0], choice.groups(shape[1])
        offsets = 0 if choice.symmetric else 2 * rows * groups if self.means else self.zero_point_bytes(choice, shape)
        codes = rows * self.row_bytes(choice, shape[1])
        return Parts(codes, offsets, 2 * rows * groups, self.extra_bytes(choice, shape))

    def row_bytes(self, choice: Choice, columns: int) -> int:
        """Bytes of a row's packed codes: whole 32-bit words."""
        return choice.row_bytes(columns)

    def symbol_bits(self, choice: Choice) -> int:
        """Bits of an entropy coder's symbol, which holds whole codes: 8 where they divide a byte."""
        return 8 if 8 % choice.bits == 0 else 6 if choice.bits == 3 else choice.bits

    def zero_point_bytes(self, choice: Choice, shape: Shape) -> int:
        """Bytes of packed zero points."""
        return 4 * choice.groups(shape[1]) * -(-shape[0] * choice.bits // 32)

    def extra_bytes(self, choice: Choice, shape: Shape) -> int:
        """Bytes of what lies behind the scales."""
        return 0

    def storage_bytes(self, choice: Choice, shape: Shape) -> int:
        """Bytes of a block: header, parts and padding."""
        return -(-(HEADER_BYTES + sum(self.parts(choice, shape))) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    # -- headers ------------------------------------------------------------------------------------

    def kind_number(self, choice: Choice) -> int:
        """What stands for a choice's kind in a header."""
        return self.kinds[kind_of(choice)]

    def of_header(self, number: int, bits: int, group_size: int, symmetric: bool) -> Choice | None:
        """The choice that a header names; None if its kind is not one of the format's. Raises ChoiceError."""
        kind = next((kind for kind, own in self.kinds.items() if own == number), None)
        return None if kind is None or bits not in self.widths else self.make(bits, group_size, symmetric, kind)

    def quarters(self, choice: Choice) -> int:
        """Quarters of a bit that a weight's code takes in a trellis; 0 of codes that stand for themselves."""
        return 0

    # -- content ------------------------------------------------------------------------------------

    def packed_zero_points(self, matrix: QuantizedMatrix) -> np.ndarray:
        """uint8 [bytes] of a matrix that has zero points."""
        return pack(np.ascontiguousarray(_array(matrix.offsets).T), matrix.choice.bits)

    def unpacked_zero_points(self, part: np.ndarray, choice: Choice, shape: Shape, extra: Any) -> np.ndarray:
        """The inverse: uint8 [rows, groups]. extra: what `read_extra` has returned."""
        return np.ascontiguousarray(unpack(part.reshape(choice.groups(shape[1]), -1), choice.bits, shape[0]).T)

    def written_extra(self, matrix: QuantizedMatrix) -> tuple[np.ndarray, ...]:
        """What lies behind the scales, in its order."""
        return ()

    def read_extra(self, part: np.ndarray, choice: Choice, shape: Shape, name: str) -> Any:
        """What a matrix holds as `extra`. Raises CheckpointError naming the tensor for what cannot be."""
        return None

    # -- values -------------------------------------------------------------------------------------

    def levels(self, choice: Choice) -> Levels:
        """What its codes stand for."""
        return levels_of_bits(choice.bits, self.halves)

    def restored(self, matrix: QuantizedMatrix, rows: slice) -> np.ndarray:
        """ŵ of some rows, float32 [rows, columns]. Float offsets of what has no means are added to s·q, as MLX does."""
        added = matrix.offsets is not None and matrix.offsets.is_floating_point() and not self.means
        count, groups = matrix.scales[rows].shape
        if matrix.offsets is None or added:
            zeros = np.tile(self.zeros(matrix) * np.float32(not added), count)
        else:
            zeros = floats(matrix.offsets, rows)
        values = np.empty((count, matrix.shape[1]), np.float32)
        self.fill(matrix, rows, zeros, values.reshape(-1))
        if added:
            starts = floats(matrix.offsets, rows).reshape(count, groups)
            values += starts.repeat(matrix.choice.group_size, axis=1)[:, : matrix.shape[1]]
        return values

    def zeros(self, matrix: QuantizedMatrix) -> np.ndarray:
        """Zero points of groups that store none, or their means of 0; float32 [groups]."""
        zero = 0.0 if self.means else self.levels(matrix.choice).zero
        return np.full(matrix.scales.shape[1], zero, np.float32)

    def fill(self, matrix: QuantizedMatrix, rows: slice, zeros: np.ndarray, out: np.ndarray) -> None:
        """Write values of some rows to a flat float32 array. zeros: zero points or means, float32 [rows · groups]."""
        from alphaq.formats.kernels import dequantize_rows  # numba, which names and sizes do not need

        codes, scales = matrix.codes[rows].numpy().reshape(-1), floats(matrix.scales, rows)
        dequantize_rows(codes, matrix.shape[1], matrix.choice.bits, matrix.choice.group_size, scales, zeros, out)


def kind_of(choice: Choice) -> str:
    """What follows the grid in a choice's name."""
    return choice.name.partition("-")[2]


def halves(part: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Stored float16 numbers. Raises CheckpointError naming the tensor if they are not finite."""
    values: np.ndarray = part.copy().view("<f2").reshape(shape)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} has scales that are not finite. Quantize the model again.")
    return values


def _array(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.numpy()
    return found


def floats(scales: Any, rows: slice) -> np.ndarray:
    """Scales or offsets of some rows, flat float32."""
    return _array(scales[rows].float()).reshape(-1)
