"""One bit for all but a few weights of each group, which have 8 and a scale of their own (PB-LLM, 2310.00034).

ŵ = mean ± s, or wide·(value − 128) where a weight is salient. The extra part has the wide scales, positions within
groups and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from alphaq.errors import CheckpointError, ChoiceError
from alphaq.formats.native import NativeFormat, halves, kind_of
from alphaq.formats.packing import UNUSED
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix


@dataclass(frozen=True)
class SalientWeights:
    """Weights of 8 bits in a binary matrix, k to a group: ŵ = scale·(value − 128) at a position within the group.

    scales: float16 [rows, groups]. positions: uint8 [rows, groups, k], ascending, 255 where there is none. values:
    uint8 [rows, groups, k].
    """

    scales: np.ndarray
    positions: np.ndarray
    values: np.ndarray


class Salient(NativeFormat):
    """Bits by weight, '1g128-pb4'. A matrix' `extra` is its `SalientWeights`."""

    name = "salient"
    examples = ("1g128-pb8", "1g64s-pb2")
    widths = (1,)
    kinds: ClassVar[dict[str, int]] = {"pb2": 2, "pb4": 3, "pb8": 4}
    means = True
    looked_up = True

    def check(self, choice: Choice) -> None:
        """Also refuse other bits than 1 for the rest."""
        kind = kind_of(choice)
        if choice.bits != 1:
            raise ChoiceError(f"-{kind} is 8-bit weights over a rest of 1 bit. Write 1-{kind}, not {choice}.")
        super().check(choice)

    def extra_bytes(self, choice: Choice, shape: Shape) -> int:
        """A scale for each group, and a position and a value for each salient weight."""
        return shape[0] * choice.groups(shape[1]) * (2 + 2 * most_of(choice))

    def written_extra(self, matrix: QuantizedMatrix) -> tuple[np.ndarray, ...]:
        """Scales, positions, values."""
        assert matrix.extra is not None  # of this format
        return matrix.extra.scales, matrix.extra.positions, matrix.extra.values

    def read_extra(self, part: np.ndarray, choice: Choice, shape: Shape, name: str) -> SalientWeights:
        """Salient weights, all of which must have their places."""
        rows, columns = shape
        groups, most = choice.groups(columns), most_of(choice)
        scale_part, positions, values = np.split(part, np.cumsum([2 * rows * groups, rows * groups * most]))
        scales, positions = halves(scale_part, (rows, groups), name), positions.reshape(rows, groups, most)
        unused = positions == UNUSED
        counts = np.minimum(choice.group_size, columns - choice.group_size * np.arange(groups))
        ascending = (positions[..., 1:] > positions[..., :-1]) | unused[..., 1:]
        if not ((positions < counts[:, None]) | unused).all() or not ascending.all():
            raise CheckpointError(
                f"{name} has salient weights where there is no place for them. Quantize the model again."
            )
        return SalientWeights(scales, positions.copy(), values.reshape(positions.shape).copy())

    def fill(self, matrix: QuantizedMatrix, rows: slice, zeros: np.ndarray, out: np.ndarray) -> None:
        """Two levels everywhere, then salient weights in their places."""
        from alphaq.formats.kernels import restore_salient  # numba, which names and sizes do not need

        super().fill(matrix, rows, zeros, out)
        assert matrix.extra is not None  # of this format
        found, choice = matrix.extra, matrix.choice
        positions, values = found.positions[rows].reshape(-1), found.values[rows].reshape(-1)
        wide = found.scales[rows].astype(np.float32).reshape(-1)
        restore_salient(positions, values, wide, most_of(choice), matrix.shape[1], choice.group_size, out)


def most_of(choice: Choice) -> int:
    """Weights of a group that may have 8 bits; 0 of other formats."""
    kind = kind_of(choice)
    return int(kind[2:]) if kind in Salient.kinds else 0


FORMAT = Salient()
