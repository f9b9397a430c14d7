"""Multiply many tokens with restored rows by AMX: 32 rows and 32 tokens at a time (see `simd.tiles`).

Rows are restored to bfloat16 in the processor's own cache, 64 of up to 2048 columns, as `restored_kernels` has them.
Tokens are turned once for all matrices that want them: [blocks, columns / 32, 16 pairs of columns, 16 tokens, 2]
bfloat16, where a block is sixteen pairs of one expert.
"""

from __future__ import annotations

import numpy as np

from alphaq.runtime.block_kernels import TASK_ROWS
from alphaq.runtime.restored_kernels import DEPTH, LINE, read_gains, restore_columns
from alphaq.simd.brains import BRAINS
from alphaq.simd.tiles import (
    SHAPES,
    STEP_BYTES,
    SUMS,
    TILE_BYTES,
    add_four_by_one,
    add_two_by_two,
    clear_sums,
    close_tiles,
    open_tiles,
    put_sums,
    turn_words,
)
from alphaq.simd.vectors import LANES, kernel, load, store

TILE = LANES * LANES  # sums
BLOCK_BYTES = 2 * LANES  # of turned tokens, for each column


@kernel
def turn_block(inputs, columns, mine, target):
    """Turn one to sixteen tokens, mine: int64, of bfloat16 inputs at an address; where there are fewer, the last."""
    places = np.empty(LANES, np.int64)
    for index in range(LANES):
        places[index] = inputs + 2 * columns * mine[min(index, mine.size - 1)]
    for step in range(columns // BRAINS):
        turn_words(places.ctypes.data, STEP_BYTES * step, target + TILE_BYTES * step)
    return places.size  # which keeps them until here


@kernel
def multiply_tiles(block, first, turned, out, column, pairs, tile, room):
    """`restored_kernels.multiply_many` with turned tokens at an address, of which pairs [count] has one each."""
    columns, tokens = block[5], pairs.size
    count = min(TASK_ROWS, block[4] - first)
    gains = read_gains(block, first, count, room)
    sums = _line_of_sums()
    shapes = SHAPES.copy()
    open_tiles(shapes.ctypes.data)
    for begin in range(0, columns, DEPTH):
        end = min(begin + DEPTH, columns)
        restore_columns(block, first, count, begin, end, tile, room)
        for token in range(0, tokens, 2 * LANES):
            place = turned + BLOCK_BYTES * (columns * (token // LANES) + begin)
            few = tokens - token <= LANES
            for row in range(0, count, 4 * LANES if few else 2 * LANES):
                if few:
                    _four_by_one(tile, row, place, end - begin, sums)
                else:
                    _two_by_two(tile, row, place, place + BLOCK_BYTES * columns, end - begin, sums)
                for part in range(SUMS):
                    at = row + LANES * (part if few else part // 2)
                    own = pairs[token + (0 if few else LANES * (part % 2)) :]
                    _give(sums[TILE * part :], gains, at, count, own, out, column + first, begin > 0)
    close_tiles()
    return shapes.size  # which keeps them until here


@kernel
def _line_of_sums():
    """Room for four sums, float32, at a line's begin."""
    raw = np.empty(SUMS * TILE + LANES, np.float32)
    skipped = -raw.ctypes.data % LINE // raw.itemsize
    return raw[skipped : skipped + SUMS * TILE]


@kernel
def _two_by_two(tile, row, one, other, columns, sums):
    """32 rows with two blocks of tokens; `_give` has the order of sums."""
    stride = 2 * tile.shape[1]
    rows = tile.ctypes.data + stride * row
    clear_sums()
    for step in range(columns // BRAINS):
        add_two_by_two(rows + STEP_BYTES * step, stride, one + TILE_BYTES * step, other + TILE_BYTES * step)
    put_sums(sums.ctypes.data)


@kernel
def _four_by_one(tile, row, one, columns, sums):
    """64 rows with one block of tokens."""
    stride = 2 * tile.shape[1]
    rows = tile.ctypes.data + stride * row
    clear_sums()
    for step in range(columns // BRAINS):
        add_four_by_one(rows + STEP_BYTES * step, stride, one + TILE_BYTES * step, 0)
    put_sums(sums.ctypes.data)


@kernel
def _give(sums, gains, row, count, pairs, out, column, more):
    """Write sums [16 rows, 16 tokens] from a row on to the pairs' results, or add them (`more`). sums are used up."""
    places = np.empty(LANES, np.int64)
    for lane in range(LANES):
        places[lane] = sums.ctypes.data + STEP_BYTES * lane
    turn_words(places.ctypes.data, 0, sums.ctypes.data)
    for index in range(min(LANES, pairs.size)):
        target = out[pairs[index]]
        if row + LANES <= count:
            value = load(sums, LANES * index) * load(gains, row)
            if more:
                value = value + load(target, column + row)
            store(target, column + row, value)
            continue
        for lane in range(count - row):
            product = sums[LANES * index + lane] * gains[row + lane]
            target[column + row + lane] = product + target[column + row + lane] if more else product
    return places.size  # which keeps them until here
