"""Multiply many tokens with restored rows by AMX: 32 rows and 32 tokens at a time, or 64 and 16 (see `simd.tiles`).

Rows are restored to bfloat16 in the processor's own cache, 64 of up to 4096 columns or 128 of up to 2048, as
`restored_kernels` has them; results are bfloat16, too.
Tokens are turned once for all matrices that want them: [blocks, columns / 32, 16 pairs of columns, 16 tokens, 2]
bfloat16, where a block is sixteen pairs of one expert.
"""

from __future__ import annotations

import numpy as np

from alphaq.runtime.block_kernels import HEADER, TASK_ROWS, TRELLIS
from alphaq.runtime.restored_kernels import KEPT_BITS, LINE, TILES_DEPTH, read_gains, restore_columns
from alphaq.runtime.trellis_kernels import row_bytes_of
from alphaq.simd.brains import BRAINS, as_brains
from alphaq.simd.codes import fetch, put_codes
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
    take_sums,
    turn_words,
)
from alphaq.simd.vectors import LANES, kernel, load

TILE = LANES * LANES  # sums
PLACE, OFFSET, LENGTH, ROW_BYTES, ROWS_LEFT = range(5)  # of codes to be fetched: a row's, the next line, bytes of a row
AHEAD = 5
BLOCK_BYTES = 2 * LANES  # of turned tokens, for each column
TILE_NUMBERS = TASK_ROWS * TILES_DEPTH  # restored: half a MiB of a cache of two
MOST_TOKENS = 1024  # whose sums are kept at a time


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
def tile_sums(tokens, span):
    """Memory for sums of up to `MOST_TOKENS` tokens with so many rows; each four begin a line."""
    blocks = -(-min(tokens, MOST_TOKENS) // (2 * LANES)) * -(-span // (2 * LANES))
    raw = np.empty(SUMS * TILE * blocks + LANES, np.float32)
    skipped = -raw.ctypes.data % LINE // raw.itemsize
    return raw[skipped : skipped + SUMS * TILE * blocks]


@kernel
def multiply_tiles(block, first, span, turned, out, column, pairs, tile, sums, room, after):
    """Products of up to `span` rows of a block, from `first` on, with turned tokens at an address.

    Of a row as many columns are restored at a time as a tile has; sums are kept in between, as the registers have them.
    out: bits of bfloat16 [pairs, width]; products of the i-th token go to row pairs[i], from `column` on. tile: see
    `tile_of`; sums: see `tile_sums`; room: see `room_of`. after: the first row of what this thread may well do
    next, whose codes are brought near meanwhile.
    """
    rows, columns = block[4], block[5]
    count, depth = min(span, rows - first), tile.shape[1] - BRAINS
    gains = np.ones(span + BRAINS, np.float32)
    shapes, ahead = SHAPES.copy(), np.zeros(AHEAD, np.int64)
    open_tiles(shapes.ctypes.data)
    for known in range(0, pairs.size, MOST_TOKENS):
        mine = pairs[known : known + MOST_TOKENS]
        for begin in range(0, columns, depth):
            end = min(begin + depth, columns)
            for part in range(0, count, TASK_ROWS):
                lines = min(TASK_ROWS, count - part)
                read_gains(block, first + part, lines, room, gains[part:])
                restore_columns(block, first + part, lines, begin, end, tile[part:], room)
            place = turned + BLOCK_BYTES * (columns * (known // LANES) + begin)
            if end < columns:
                _look_ahead(block, first, count, end, min(end + depth, columns), ahead)
            elif known + MOST_TOKENS < pairs.size:
                _look_ahead(block, first, count, 0, min(depth, columns), ahead)
            else:
                _look_ahead(block, after, min(span, rows - after), 0, min(depth, columns), ahead)
            _multiply_piece(
                tile,
                count,
                begin > 0,
                end < columns,
                end - begin,
                place,
                columns,
                mine,
                sums,
                gains,
                out,
                column + first,
                ahead,
            )
    close_tiles()
    return shapes.size  # which keeps them until here


@kernel
def _multiply_piece(tile, count, more, going, depth, turned, columns, pairs, sums, gains, out, column, ahead):
    """Add products of a tile's columns to sums where there are `more`; give the results unless they go on (`going`)."""
    flat, width = out.reshape(-1), out.shape[1]
    places = np.empty(SUMS * LANES, np.int64)  # of sixteen rows of each sum
    for row in range(places.size):
        places[row] = sums.ctypes.data + STEP_BYTES * row
    at = 0
    for token in range(0, pairs.size, 2 * LANES):
        mine = pairs[token : token + 2 * LANES]
        few = mine.size <= LANES
        step = 4 * LANES if few else 2 * LANES
        place = turned + BLOCK_BYTES * columns * (token // LANES)
        for row in range(0, count, step):
            own = sums[at : at + SUMS * TILE]
            if more:
                take_sums(own.ctypes.data)
            else:
                clear_sums()
            if few:
                _four_by_one(tile, row, place, depth, ahead)
            else:
                _two_by_two(tile, row, place, place + BLOCK_BYTES * columns, depth, ahead)
            put_sums(own.ctypes.data)
            if not going:
                _expect(mine, flat, width, column + row, step)
                for part in range(SUMS):
                    offset = own.itemsize * at
                    turn_words(places.ctypes.data + 8 * LANES * part, offset, own.ctypes.data + TILE_BYTES * part)
                for half in range(2):  # rows, or of tokens
                    if few:
                        parts, below, after = (2 * half, 2 * half + 1), BRAINS * half, 0
                    else:
                        parts, below, after = (half, half + 2), 0, LANES * half
                    _give(own, parts, gains, row + below, count, mine[after : after + LANES], flat, width, column)
            if going or more:
                at += SUMS * TILE
    return places.size + flat.size  # which keeps them until here


@kernel
def _look_ahead(block, first, count, begin, end, ahead):
    """Have codes of some rows and columns fetched by and by."""
    address, bits, _, flags, _, columns = block
    if flags & TRELLIS:
        address, row_bytes = address + HEADER, row_bytes_of(columns, bits)
    elif bits == KEPT_BITS:
        row_bytes = 2 * columns
    else:
        address, row_bytes = address + HEADER, 4 * -(-columns * bits // 32)
    ahead[PLACE], ahead[ROW_BYTES] = address + row_bytes * first + row_bytes * begin // columns, row_bytes
    ahead[OFFSET], ahead[LENGTH], ahead[ROWS_LEFT] = 0, row_bytes * (end - begin) // columns, count


@kernel
def _fetch_ahead(ahead):
    """Bring the next line near, if there is one."""
    if ahead[ROWS_LEFT] > 0:
        fetch(ahead[PLACE] + ahead[OFFSET])
        ahead[OFFSET] += LINE
        if ahead[OFFSET] >= ahead[LENGTH]:
            ahead[OFFSET] = 0
            ahead[PLACE] += ahead[ROW_BYTES]
            ahead[ROWS_LEFT] -= 1


@kernel
def _expect(pairs, flat, width, column, count):
    """Have brought near what sums of some rows will be written to."""
    for index in range(pairs.size):
        place = flat.ctypes.data + flat.itemsize * (pairs[index] * width + column)
        for line in range(0, flat.itemsize * count, LINE):
            fetch(place + line)


@kernel
def _two_by_two(tile, row, one, other, columns, ahead):
    """Add 32 rows with two blocks of tokens; `_multiply_piece` has the order of sums."""
    stride = 2 * tile.shape[1]
    rows = tile.ctypes.data + stride * row
    for step in range(columns // BRAINS):
        _fetch_ahead(ahead)
        _fetch_ahead(ahead)
        add_two_by_two(rows + STEP_BYTES * step, stride, one + TILE_BYTES * step, other + TILE_BYTES * step)


@kernel
def _four_by_one(tile, row, one, columns, ahead):
    """Add 64 rows with one block of tokens."""
    stride = 2 * tile.shape[1]
    rows = tile.ctypes.data + stride * row
    for step in range(columns // BRAINS):
        _fetch_ahead(ahead)
        _fetch_ahead(ahead)
        add_four_by_one(rows + STEP_BYTES * step, stride, one + TILE_BYTES * step, 0)


@kernel
def _give(sums, parts, gains, row, count, pairs, flat, width, column):
    """Write two of the four sums, [16 tokens, 16 rows] each, to the pairs' results from a row on: 32 rows."""
    low, high = TILE * parts[0], TILE * parts[1]
    least, most = load(gains, row), load(gains, row + LANES)
    whole, rest = row + BRAINS <= count, np.empty(BRAINS, np.uint16)
    for index in range(pairs.size):
        place = pairs[index] * width + column + row
        products = as_brains(load(sums, low + LANES * index) * least, load(sums, high + LANES * index) * most)
        if whole:
            put_codes(flat.ctypes.data + flat.itemsize * place, products)
            continue
        put_codes(rest.ctypes.data, products)
        for lane in range(count - row):
            flat[place + lane] = rest[lane]
