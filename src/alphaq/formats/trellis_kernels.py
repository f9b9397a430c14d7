"""Values of trellis codes, weight after weight."""

from __future__ import annotations

import numpy as np

from alphaq.simd.vectors import kernel


@kernel
def restore_rows(packed, columns, quarters, levels, group_size, scales, out):
    """Values of whole rows, float32 [rows · columns]: scale · levels[state].

    packed: uint8 [rows · bytes per row]. quarters: of a bit per weight. levels: int8 [1024]. scales: float32
    [rows · groups].
    """
    newest = levels.size >> 1
    rows = out.size // columns
    groups = -(-columns // group_size)
    row_bytes = packed.size // rows
    for row in range(rows):
        state, bit = 0, 0
        for column in range(columns):
            while bit < (column + 1) * quarters // 4:
                byte = packed[row * row_bytes + (bit >> 3)]
                state = (state >> 1) + ((byte >> (bit & 7)) & 1) * newest
                bit += 1
            out[row * columns + column] = scales[row * groups + column // group_size] * np.float32(levels[state])
