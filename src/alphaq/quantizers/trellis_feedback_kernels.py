"""Trellis codes of a block of columns, a few columns at a time, each with the errors of those before it."""

from __future__ import annotations

import numpy as np

from alphaq.quantizers.trellis_kernels import cheapest, on_lines, trace, write
from alphaq.simd.vectors import kernel


@kernel
def encode_block(
    mixing,
    columns,
    width,
    worth,
    step,
    ahead,
    first,
    quarters,
    group_size,
    levels,
    near,
    misses,
    scales,
    states,
    packed,
):
    """Add codes of a block of columns to the streams of some rows.

    mixing: float32 [block · width], the share of a column's error that each takes over, of the block's columns and
    those behind it. worth: float32 [block], what the square of an error costs. step: columns that are decided together,
    by the cheapest path through them and the `ahead` next ones. first: the block's first column, of `columns`. near:
    float32 [rows · width], what the columns should be; later ones take over errors in place. misses: float32
    [rows · block], the weights, of which w − ŵ becomes. scales: float32 [rows · groups]. states: int64 [rows], the last
    of each row, the newest bit lowest. quarters, group_size, levels, packed: as in `encode_rows`.
    """
    count, groups, row_bytes = worth.size, -(-columns // group_size), packed.size // states.size
    most = min(step + ahead, width)
    roots, targets, path = np.empty(most, np.float32), np.empty(most, np.float32), np.empty(most, np.int32)
    outcomes, costs = on_lines(most * (levels.size // 8)), on_lines(8 * levels.size).view(np.float32)
    spread = np.float32(np.sqrt(np.mean(np.square(levels))))
    for row in range(states.size):
        wanted, scale = near[row * width : (row + 1) * width], scales[row * groups : (row + 1) * groups]
        stream, miss = packed[row * row_bytes : (row + 1) * row_bytes], misses[row * count : (row + 1) * count]
        if not scale.max() > 0:  # nothing but zeros can be stored
            continue
        unit = np.float32(1) / (spread * scale.max())
        for begin in range(0, count, step):
            end = min(begin + step, count)
            size = min(end + ahead, width) - begin
            for column in range(size):
                root = np.sqrt(worth[min(begin + column, count - 1)]) * unit
                roots[column] = root * scale[(first + begin + column) // group_size]
                targets[column] = root * wanted[begin + column]
            now = first + begin
            last = cheapest(roots[:size], targets[:size], now, states[row], quarters, levels, outcomes, costs)
            trace(last, now, quarters, levels.size, outcomes, path[:size])
            write(path[: end - begin], now, quarters, stream)
            states[row] = path[end - begin - 1]
            for column in range(begin, end):
                miss[column] -= scale[(first + column) // group_size] * levels[path[column - begin]]
                for later in range(end, width):
                    wanted[later] += mixing[column * width + later] * miss[column]
