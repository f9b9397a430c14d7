"""Multiply many tokens with part of a matrix at a time, restored to bfloat16 in the processor's own cache.

64 rows of up to 2048 columns are restored once, and every token that wants the matrix is multiplied with them, four
tokens and four rows at a time: sixteen sums in registers, for which eight lines of memory are read a step. Levels of a
trellis are whole numbers that bfloat16 holds exactly; the scale of their row multiplies the sums.
"""

from __future__ import annotations

import numpy as np

from alphaq.formats.kept import KEPT
from alphaq.formats.trellis import UNIT
from alphaq.runtime.block_kernels import HEADER, TASK_ROWS, TRELLIS, last_codes, read_grids, read_scales
from alphaq.runtime.state_kernels import BEFORE, FRESH, MIDDLE, weights_at
from alphaq.runtime.trellis_kernels import end_of_row, row_bytes_of
from alphaq.simd.brains import (
    BRAINS,
    add_brain_products,
    as_brains,
    four_sums,
)
from alphaq.simd.codes import CODES, brains_at, codes_at, halves_at, put_brains, put_codes, unpack
from alphaq.simd.vectors import LANES, as_brain, fma, kernel, load, load_bytes, splat, store

DEPTH = 2048  # columns: 64 rows of them and four tokens stay in the caches of a core
TILES_DEPTH = 4096  # at most, of what `tile_kernels` restores
LINE = 64  # bytes, of a cache
KEPT_BITS = KEPT.bits


@kernel
def tile_of(rows, columns):
    """Memory for restored rows: uint16 [rows, columns + 32]; each begins a line, a little apart in the cache."""
    stride = columns // BRAINS * BRAINS + BRAINS
    raw = np.empty(rows * stride + LINE, np.uint16)
    skipped = -raw.ctypes.data % LINE // raw.itemsize
    return raw[skipped : skipped + rows * stride].reshape(rows, stride)


@kernel
def multiply_many(block, first, mine, inputs, out, column, pairs, tile, room):
    """Products of up to 64 rows of a block, from `first` on, with many tokens.

    mine: int64 [count], tokens; inputs: address of bfloat16 [tokens, columns], a multiple of 32. out: float32
    [pairs, width]; products of mine[i] go to row pairs[i], from `column` on. tile: see `tile_of`.
    """
    rows, columns = block[4], block[5]
    count = min(TASK_ROWS, rows - first)
    gains = np.ones(TASK_ROWS + LANES, np.float32)
    read_gains(block, first, count, room, gains)
    sums = np.empty(4 * LANES, np.float32)
    for begin in range(0, columns, DEPTH):
        end = min(begin + DEPTH, columns)
        restore_columns(block, first, count, begin, end, tile, room)
        for token in range(0, mine.size, 4):
            for row in range(0, count, 4):
                _sixteen_products(tile, row, count, inputs, columns, begin, end, mine, token, sums)
                for index in range(min(4, mine.size - token)):
                    place = pairs[token + index]
                    for part in range(min(4, count - row)):
                        product = sums[LANES * index + part] * gains[row + part]
                        if begin:
                            product += out[place, column + first + row + part]
                        out[place, column + first + row + part] = product


@kernel
def read_gains(block, first, count, room, gains):
    """What sums of trellis codes' rows are to be multiplied by to gains, which come as 1; other codes' grids to a room.

    Lanes are read: gains have sixteen places more than rows.
    """
    address, bits, _, flags, rows, columns = block
    if flags & TRELLIS:
        read_scales(address + HEADER + rows * row_bytes_of(columns, bits) + 2 * first, count, gains)
        for row in range(count):
            gains[row] *= np.float32(UNIT)
    elif bits != KEPT_BITS:
        read_grids(block, first, count, room[0], room[1], room[4])


@kernel
def restore_columns(block, first, count, begin, end, tile, room):
    """Restore some rows and columns of a block, whose grids were read, to a tile."""
    if block[3] & TRELLIS:
        _restore_levels(block, first, count, begin, end, tile, room)
    elif block[1] == KEPT_BITS:
        _restore_kept(block, first, count, begin, end, tile)
    else:
        _restore_codes(block, first, count, begin, end, tile, room)


@kernel
def _sixteen_products(tile, row, count, inputs, columns, begin, end, mine, token, sums):
    """Four rows of a tile with four tokens; where there are fewer, the last again. sums: [4, LANES], four of each."""
    stride, last, length = 2 * tile.shape[1], mine.size - 1, 2 * (end - begin)
    row1, row2, row3 = min(row + 1, count - 1), min(row + 2, count - 1), min(row + 3, count - 1)
    token1, token2, token3 = min(token + 1, last), min(token + 2, last), min(token + 3, last)
    base, start = tile.ctypes.data, inputs + 2 * begin
    w0, w1, w2, w3 = base + stride * row, base + stride * row1, base + stride * row2, base + stride * row3
    x0, x1 = start + 2 * columns * mine[token], start + 2 * columns * mine[token1]
    x2, x3 = start + 2 * columns * mine[token2], start + 2 * columns * mine[token3]
    a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = splat(np.float32(0))
    a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = splat(np.float32(0))
    for at in range(0, length, CODES):
        r0, r1, r2, r3 = codes_at(w0 + at), codes_at(w1 + at), codes_at(w2 + at), codes_at(w3 + at)
        x = codes_at(x0 + at)
        a00, a01 = add_brain_products(a00, r0, x), add_brain_products(a01, r1, x)
        a02, a03 = add_brain_products(a02, r2, x), add_brain_products(a03, r3, x)
        x = codes_at(x1 + at)
        a10, a11 = add_brain_products(a10, r0, x), add_brain_products(a11, r1, x)
        a12, a13 = add_brain_products(a12, r2, x), add_brain_products(a13, r3, x)
        x = codes_at(x2 + at)
        a20, a21 = add_brain_products(a20, r0, x), add_brain_products(a21, r1, x)
        a22, a23 = add_brain_products(a22, r2, x), add_brain_products(a23, r3, x)
        x = codes_at(x3 + at)
        a30, a31 = add_brain_products(a30, r0, x), add_brain_products(a31, r1, x)
        a32, a33 = add_brain_products(a32, r2, x), add_brain_products(a33, r3, x)
    store(sums, 0, four_sums(a00, a01, a02, a03))
    store(sums, LANES, four_sums(a10, a11, a12, a13))
    store(sums, 2 * LANES, four_sums(a20, a21, a22, a23))
    store(sums, 3 * LANES, four_sums(a30, a31, a32, a33))


@kernel
def _read_lines(block, row, begin, end, room, slopes, starts):
    """Slopes and starts of a row's groups from column `begin` to `end`: a weight is code·slope + start.

    Starts are exact, since scales have 11 bits and zero points at most 8, but for 1 bit, where they are rounded.
    """
    _, bits, group_size, symmetric, _, columns = block
    scales, means, zeros = room[0], room[1], room[4]
    groups, first = -(-columns // group_size), begin // group_size
    middle = splat(np.float32(2 ** (bits - 1)) - (np.float32(0.5) if symmetric > 1 else np.float32(0)))
    none = splat(np.float32(0))
    for group in range(first, -(-end // group_size), LANES):
        slope = load(scales, row * groups + group)
        if bits == 1:
            start = (none if symmetric else load(means, row * groups + group)) - slope
            slope = slope + slope
        elif symmetric:
            start = none - slope * middle
        else:
            start = none - slope * load_bytes(zeros, group * CODES + LANES * row)
        store(slopes, group - first, slope)
        store(starts, group - first, start)


@kernel
def _restore_codes(block, first, count, begin, end, tile, room):
    """Integer codes of some rows and columns to bfloat16, as `block_kernels.restore_block` has them."""
    address, bits, group_size, _, _, columns = block
    rest, row_bytes = room[5], 4 * -(-columns * bits // 32)
    codes = np.empty(CODES, np.uint8)  # lanes taken from memory are cheaper than those of registers
    shift = 5 if group_size == 32 else 6 if group_size == 64 else 7
    slopes, starts = np.empty(TILES_DEPTH // 32 + LANES, np.float32), np.empty(TILES_DEPTH // 32 + LANES, np.float32)
    for row in range(count):
        source = address + HEADER + (first + row) * row_bytes
        last = last_codes(source, columns, bits, rest)
        target = tile.ctypes.data + 2 * row * tile.shape[1]
        _read_lines(block, row, begin, end, room, slopes, starts)
        source += bits * begin // 8
        for at in range(0, end - begin, CODES):
            put_codes(codes.ctypes.data, unpack(source if begin + at + CODES <= columns else last, bits))
            slope, start = splat(slopes[at >> shift]), splat(starts[at >> shift])
            low, high = fma(load_bytes(codes, 0), slope, start), fma(load_bytes(codes, LANES), slope, start)
            put_codes(target + 2 * at, as_brains(low, high))
            if begin + at + BRAINS < end:
                slope, start = splat(slopes[at + BRAINS >> shift]), splat(starts[at + BRAINS >> shift])
                low = fma(load_bytes(codes, 2 * LANES), slope, start)
                high = fma(load_bytes(codes, 3 * LANES), slope, start)
                put_codes(target + 2 * (at + BRAINS), as_brains(low, high))
            source += 8 * bits


@kernel
def _restore_levels(block, first, count, begin, end, tile, room):
    """Levels of trellis codes of some rows and columns."""
    address, rate, _, _, _, columns = block
    rest, row_bytes = room[5], row_bytes_of(columns, rate)
    middle, levels = splat(np.float32(MIDDLE)), np.empty(CODES, np.uint8)
    for row in range(count):
        source = address + HEADER + (first + row) * row_bytes
        last = end_of_row(source, columns, rate, rest)
        target = tile.ctypes.data + 2 * row * tile.shape[1] - 2 * begin
        for chunk in range(begin, end, CODES):
            place = source - BEFORE + rate * chunk // 32 if chunk + CODES <= columns else last
            put_codes(levels.ctypes.data, weights_at(place, rate, -1 if chunk else FRESH))
            low, high = load_bytes(levels, 0) - middle, load_bytes(levels, LANES) - middle
            put_codes(target + 2 * chunk, as_brains(low, high))
            if chunk + BRAINS < end:
                low, high = load_bytes(levels, 2 * LANES) - middle, load_bytes(levels, 3 * LANES) - middle
                put_codes(target + 2 * (chunk + BRAINS), as_brains(low, high))


@kernel
def _restore_kept(block, first, count, begin, end, tile):
    """Rows and columns of a matrix of 16 bits, which are float16 if flagged."""
    address, _, _, half, _, columns = block
    for row in range(count):
        source = address + 2 * (first + row) * columns
        target = tile.ctypes.data + 2 * row * tile.shape[1] - 2 * begin
        for at in range(begin, end, LANES):
            value = halves_at(source + 2 * at) if half else brains_at(source + 2 * at)
            put_brains(target + 2 * at, as_brain(value))
