"""Multiply many tokens with part of a matrix at a time, restored to bfloat16 in the processor's own cache.

64 rows of up to 2048 columns are restored once, and every token that wants the matrix is multiplied with them, four
tokens and four rows at a time: sixteen sums in registers, for which eight lines of memory are read a step. Codes of up
to 5 bits have at most 32 values in a group, which are looked up instead of computed. Levels of a trellis are whole
numbers that bfloat16 holds exactly; the scale of their row multiplies the sums.
"""

from __future__ import annotations

import numpy as np

from alphaq.formats.kept import KEPT
from alphaq.formats.trellis import UNIT
from alphaq.runtime.block_kernels import HEADER, TASK_ROWS, TRELLIS, grid_of, last_codes, read_grids, read_scales
from alphaq.runtime.state_kernels import BEFORE, FRESH, MIDDLE, weights_at
from alphaq.runtime.trellis_kernels import end_of_row, row_bytes_of
from alphaq.simd.brains import BRAINS, add_brain_products, brain_table, first_brains, four_sums, last_brains
from alphaq.simd.codes import CODES, brains_at, codes_at, halves_at, put_brains, put_codes, unpack
from alphaq.simd.vectors import LANES, as_brain, kernel, load, load_bytes, splat, store

DEPTH = 2048  # columns: 64 rows of them and four tokens stay in the caches of a core
LINE = 64  # bytes, of a cache
KEPT_BITS = KEPT.bits
LOOKED_UP = 5  # bits: 32 values
NUMBERS = np.arange(2 * LANES, dtype=np.float32)


@kernel
def tile_of(columns):
    """Memory for restored rows: uint16 [TASK_ROWS, stride], each at the begin of a line, a little apart in the cache."""
    stride = (min(columns, DEPTH) // BRAINS + 1) * BRAINS
    raw = np.empty(TASK_ROWS * stride + LINE, np.uint16)
    skipped = -raw.ctypes.data % LINE // raw.itemsize
    return raw[skipped : skipped + TASK_ROWS * stride].reshape(TASK_ROWS, stride)


@kernel
def multiply_many(block, first, mine, inputs, out, column, pairs, tile, room):
    """Products of up to 64 rows of a block, from `first` on, with many tokens.

    mine: int64 [count], tokens; inputs: address of bfloat16 [tokens, columns], a multiple of 32. out: float32
    [pairs, width]; products of mine[i] go to row pairs[i], from `column` on. tile: see `tile_of`.
    """
    rows, columns = block[4], block[5]
    count = min(TASK_ROWS, rows - first)
    gains = read_gains(block, first, count, room)
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
def read_gains(block, first, count, room):
    """What sums of each row are to be multiplied by, which is 1 but for trellis codes; reads other codes' grids."""
    address, bits, _, flags, rows, columns = block
    gains = np.ones(TASK_ROWS + LANES, np.float32)  # `read_scales` writes lanes of zeros after the last
    if flags & TRELLIS:
        read_scales(address + HEADER + rows * row_bytes_of(columns, bits) + 2 * first, count, gains)
        for row in range(count):
            gains[row] *= np.float32(UNIT)
    elif bits != KEPT_BITS:
        read_grids(block, first, count, room[0], room[1], room[4])
    return gains


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
def _values(scale, zero, start, wide):
    """What each code of up to 5 bits stands for in a group; `wide` if there are more than sixteen."""
    low = as_brain((load(NUMBERS, 0) - splat(zero)) * splat(scale) + splat(start))
    high = low
    if wide:
        high = as_brain((load(NUMBERS, LANES) - splat(zero)) * splat(scale) + splat(start))
    return brain_table(low, high)


@kernel
def _restore_codes(block, first, count, begin, end, tile, room):
    """Integer codes of some rows and columns to bfloat16, as `block_kernels.restore_block` has them."""
    address, bits, group_size, symmetric, _, columns = block
    scales, means, _, _, zeros, rest = room
    groups, row_bytes = -(-columns // group_size), 4 * -(-columns * bits // 32)
    codes = rest[CODES:]
    for row in range(count):
        source = address + HEADER + (first + row) * row_bytes
        last = last_codes(source, columns, bits, rest)
        target = tile.ctypes.data + 2 * row * tile.shape[1] - 2 * begin
        known = -1
        table = _values(np.float32(0), np.float32(0), np.float32(0), False)
        for chunk in range(begin, end, CODES):
            unpacked = unpack(source + bits * chunk // 8 if chunk + CODES <= columns else last, bits)
            if bits <= LOOKED_UP:
                for half in range(2):
                    at = chunk + half * BRAINS
                    if at >= end:
                        break
                    group = at // group_size
                    if group != known:
                        scale, zero, start = grid_of(group, row, groups, bits, symmetric, scales, means, zeros)
                        table, known = _values(scale, zero, start, bits == LOOKED_UP), group
                    put_codes(target + 2 * at, last_brains(table, unpacked) if half else first_brains(table, unpacked))
                continue
            put_codes(codes.ctypes.data, unpacked)
            for at in range(chunk, min(chunk + CODES, end), LANES):
                scale, zero, start = grid_of(at // group_size, row, groups, bits, symmetric, scales, means, zeros)
                value = (load_bytes(codes, at - chunk) - splat(zero)) * splat(scale) + splat(start)
                put_brains(target + 2 * at, as_brain(value))


@kernel
def _restore_levels(block, first, count, begin, end, tile, room):
    """Levels of trellis codes of some rows and columns."""
    address, rate, _, _, _, columns = block
    rest, row_bytes = room[5], row_bytes_of(columns, rate)
    codes, middle = rest[CODES:], splat(np.float32(MIDDLE))
    for row in range(count):
        source = address + HEADER + (first + row) * row_bytes
        last = end_of_row(source, columns, rate, rest)
        target = tile.ctypes.data + 2 * row * tile.shape[1] - 2 * begin
        for chunk in range(begin, end, CODES):
            place = source - BEFORE + rate * chunk // 32 if chunk + CODES <= columns else last
            put_codes(codes.ctypes.data, weights_at(place, rate, -1 if chunk else FRESH))
            for at in range(chunk, min(chunk + CODES, end), LANES):
                put_brains(target + 2 * at, load_bytes(codes, at - chunk) - middle)


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
