"""Multiply many tokens with restored rows by AMX: 32 rows and 32 tokens at a time (see `simd.tiles`).

Rows are restored to bfloat16 in the processor's own cache, 64 of up to 4096 columns, as `restored_kernels` has them.
Tokens are turned once for all matrices that want them: [blocks, columns / 32, 16 pairs of columns, 16 tokens, 2]
bfloat16, where a block is sixteen pairs of one expert.
"""

from __future__ import annotations

import numpy as np

from alphaq.runtime.block_kernels import TASK_ROWS
from alphaq.runtime.restored_kernels import LINE, TILES_DEPTH, read_gains, restore_columns
from alphaq.simd.brains import BRAINS
from alphaq.simd.codes import fetch
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
    """Products of up to 64 rows of a block, from `first` on, with turned tokens at an address.

    out: float32 [pairs, width]; products of the i-th token go to row pairs[i], from `column` on. tile: see `tile_of`;
    room: see `room_of`.
    """
    rows, columns = block[4], block[5]
    count, width = min(TASK_ROWS, rows - first), out.shape[1]
    gains = np.ones(TASK_ROWS + LANES, np.float32)
    read_gains(block, first, count, room, gains)
    raw = np.empty(SUMS * TILE + LANES, np.float32)
    skipped = -raw.ctypes.data % LINE // raw.itemsize
    sums, flat = raw[skipped : skipped + SUMS * TILE], out.reshape(-1)
    places = np.empty(SUMS * LANES, np.int64)  # of sixteen rows of each sum
    for row in range(places.size):
        places[row] = sums.ctypes.data + STEP_BYTES * row
    shapes = SHAPES.copy()
    open_tiles(shapes.ctypes.data)
    for begin in range(0, columns, TILES_DEPTH):
        end = min(begin + TILES_DEPTH, columns)
        restore_columns(block, first, count, begin, end, tile, room)
        for token in range(0, pairs.size, 2 * LANES):
            mine = pairs[token : token + 2 * LANES]
            few = mine.size <= LANES
            place = turned + BLOCK_BYTES * (columns * (token // LANES) + begin)
            for row in range(0, count, 4 * LANES if few else 2 * LANES):
                _expect(mine, flat, width, column + first + row, 4 * LANES if few else 2 * LANES)
                if few:
                    _four_by_one(tile, row, place, end - begin, sums)
                else:
                    _two_by_two(tile, row, place, place + BLOCK_BYTES * columns, end - begin, sums)
                for part in range(SUMS):
                    turn_words(places.ctypes.data + 8 * LANES * part, 0, sums.ctypes.data + TILE_BYTES * part)
                    at, known = (LANES * part, 0) if few else (LANES * (part // 2), LANES * (part % 2))
                    own = mine[known : known + LANES]
                    _give(sums, TILE * part, gains, row + at, count, own, flat, width, column + first, begin > 0)
    close_tiles()
    return shapes.size + raw.size + places.size + flat.size  # which keeps them until here


@kernel
def _expect(pairs, flat, width, column, count):
    """Have brought near what sums of some rows will be written to."""
    for index in range(pairs.size):
        place = flat.ctypes.data + flat.itemsize * (pairs[index] * width + column)
        for line in range(0, flat.itemsize * count, LINE):
            fetch(place + line)


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
def _give(sums, at, gains, row, count, pairs, flat, width, column, more):
    """Write sums from `at` on, [16 tokens, 16 rows] from a row on, to the pairs' results, or add them (`more`)."""
    whole, gain = row + LANES <= count, load(gains, row)
    for index in range(pairs.size):
        place = pairs[index] * width + column + row
        if whole:
            product = load(sums, at + LANES * index) * gain
            store(flat, place, product + load(flat, place) if more else product)
            continue
        for lane in range(count - row):
            product = sums[at + LANES * index + lane] * gains[row + lane]
            flat[place + lane] = product + flat[place + lane] if more else product
