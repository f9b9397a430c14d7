"""Read native blocks: scales, means and zero points of 64 rows, a row's last codes, and values restored.

A block is a tuple: its address, bits, group size, flags, rows and columns. Flags are sums: `SYMMETRIC` where there are
no offsets, `HALVES` where levels are odd halves of a step, `RESTORED` of what has no kernel, `TRELLIS` of trellis
codes, whose bits are a rate in quarters.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from alphaq.simd.codes import (
    CODES,
    byte_at,
    half_at,
    halves_at,
    pointer,
    put_brains,
    put_byte,
    put_codes,
    put_floats,
    transpose_bytes,
    unpack,
)
from alphaq.simd.vectors import LANES, as_brain, kernel, load_bytes, splat, store

SYMMETRIC, HALVES, RESTORED, TRELLIS = 1, 2, 4, 8
TASK_ROWS = 64
HEADER = 16


@kernel
def _rest_of_row(address, length, rest):
    """The bytes of a row's last codes, where 64 codes would reach beyond it."""
    for at in range(length):
        rest[at] = byte_at(address + at)
    return rest.ctypes.data


@kernel
def last_codes(source, columns, bits, rest):
    """Where a row's codes after the last 64 whole ones can be read as if there were 64."""
    whole = 8 * bits * (columns // CODES)
    return _rest_of_row(source + whole, 4 * -(-columns * bits // 32) - whole, rest) if columns % CODES else source


@kernel
def read_scales(address, count, scales):
    """float16 at an address to float32."""
    whole = count // LANES * LANES
    store(scales, whole, splat(np.float32(0)))  # whole lanes are read, of which nothing else may spoil the sums
    for at in range(0, whole, LANES):
        store(scales, at, halves_at(address + 2 * at))
    for at in range(whole, count):
        scales[at] = half_at(address + 2 * at)


@kernel
def _zero_points(address, rows, bits, groups, first, count, turned):
    """Zero points of up to 64 rows from row `first` on: bytes [⌈groups / 16⌉, 64, 16], and room for sixteen rows."""
    stride = 4 * -(-rows * bits // 32)
    tile, rest = turned[turned.size - CODES * LANES :], np.empty(CODES, np.uint8)
    for begin in range(0, groups, LANES):
        for group in range(begin, min(begin + LANES, groups)):
            place = address + group * stride + first * bits // 8
            if count < CODES:
                place = _rest_of_row(place, -(-count * bits // 8), rest)
            put_codes(tile.ctypes.data + CODES * (group - begin), unpack(place, bits))
        transpose_bytes(tile.ctypes.data, turned.ctypes.data + begin * CODES)


@kernel
def _sizes(columns, tokens):
    """How many numbers `room_of` has of each kind: of scales, weights, totals and zero points."""
    groups = -(-columns // 32)
    padded = -(-groups // LANES) * LANES
    return TASK_ROWS * groups + 2 * LANES, tokens * padded + LANES, tokens * LANES, CODES * (padded + LANES)


@kernel
def room_of(columns, tokens):
    """Memory that a thread uses for every task: scales, means, weights and totals, zero points, a row's end."""
    scales, weights, totals, zeros = _sizes(columns, tokens)
    return (
        np.zeros(scales, np.float32),
        np.zeros(scales, np.float32),
        np.zeros(weights, np.float32),
        np.zeros(totals, np.float32),
        np.zeros(zeros, np.uint8),
        np.zeros(2 * CODES, np.uint8),
    )


@kernel
def room_bytes(columns, tokens):
    """Bytes of `room_of`."""
    scales, weights, totals, zeros = _sizes(columns, tokens)
    return 4 * (2 * scales + weights + totals) + zeros + 2 * CODES


@kernel
def room_at(address, columns, tokens):
    """`room_of` at an address, where there are zeros."""
    scales, weights, totals, zeros = _sizes(columns, tokens)
    means_at = address + 4 * scales
    weights_at = means_at + 4 * scales
    totals_at = weights_at + 4 * weights
    zeros_at = totals_at + 4 * totals
    return (
        carray(pointer(address), (scales,), np.float32),
        carray(pointer(means_at), (scales,), np.float32),
        carray(pointer(weights_at), (weights,), np.float32),
        carray(pointer(totals_at), (totals,), np.float32),
        carray(pointer(zeros_at), (zeros,), np.uint8),
        carray(pointer(zeros_at + zeros), (2 * CODES,), np.uint8),
    )


@kernel
def read_grids(block, first, count, scales, means, zeros):
    """Read scales [count · groups] of some rows, and their means (likewise) or zero points (as `_zero_points`)."""
    address, bits, group_size, symmetric, rows, columns = block
    groups = -(-columns // group_size)
    offsets = address + HEADER + 4 * rows * -(-columns * bits // 32)
    after = offsets
    if not symmetric:
        after += 2 * rows * groups if bits == 1 else 4 * groups * -(-rows * bits // 32)
    read_scales(after + 2 * first * groups, count * groups, scales)
    # Lanes are read from any of them: what another matrix left, if infinite, times 0 would be no number.
    beyond, none = (count * groups // LANES + 1) * LANES, splat(np.float32(0))
    store(scales, beyond, none)
    store(means, beyond, none)
    if not symmetric:
        if bits == 1:
            read_scales(offsets + 2 * first * groups, count * groups, means)
        else:
            _zero_points(offsets, rows, bits, groups, first, count, zeros)


@kernel
def grid_of(group, row, groups, bits, symmetric, scales, means, zeros):
    """Scale, zero point and start of a group: a weight is (code − zero)·scale + start."""
    scale = scales[row * groups + group]
    zero, start = np.float32(0), np.float32(0)
    if bits == 1:
        start = (means[row * groups + group] if not symmetric else np.float32(0)) - scale
        scale = np.float32(2) * scale
    elif symmetric:
        zero = np.float32(2 ** (bits - 1)) - (np.float32(0.5) if symmetric > 1 else np.float32(0))
    else:
        zero = np.float32(zeros[group // LANES * LANES * CODES + LANES * row + group % LANES])
    return scale, zero, start


@kernel
def restore_block(block, first, brain, out, room):
    """Values of up to 64 rows from `first` on to an address, as bfloat16 (`brain`) or float32. room: see `room_of`."""
    address, bits, group_size, symmetric, rows, columns = block
    scales, means, _, _, zeros, rest = room
    count = min(TASK_ROWS, rows - first)
    groups = -(-columns // group_size)
    row_bytes = 4 * -(-columns * bits // 32)
    read_grids(block, first, count, scales, means, zeros)
    codes = rest[CODES:]
    width = 2 if brain else 4
    values = np.empty(2 * LANES, np.float32)
    raw = values.view(np.uint8)
    for row in range(count):
        source = address + HEADER + (first + row) * row_bytes
        last = last_codes(source, columns, bits, rest)
        target = out + width * row * columns
        for chunk in range(-(-columns // CODES)):
            place = source + 8 * bits * chunk if (chunk + 1) * CODES <= columns else last
            put_codes(codes.ctypes.data, unpack(place, bits))
            for begin in range(chunk * CODES, min((chunk + 1) * CODES, columns), 32):  # of one group
                scale, zero, start = grid_of(begin // group_size, row, groups, bits, symmetric, scales, means, zeros)
                low = (load_bytes(codes, begin % CODES) - splat(zero)) * splat(scale) + splat(start)
                high = (load_bytes(codes, begin % CODES + LANES) - splat(zero)) * splat(scale) + splat(start)
                if brain:
                    low, high = as_brain(low), as_brain(high)
                if begin + 32 <= columns:
                    if brain:
                        put_brains(target + 2 * begin, low)
                        put_brains(target + 2 * (begin + LANES), high)
                    else:
                        put_floats(target + 4 * begin, low)
                        put_floats(target + 4 * (begin + LANES), high)
                else:
                    store(values, 0, low)
                    store(values, LANES, high)
                    for lane in range(columns - begin):
                        for byte in range(width):
                            put_byte(target + width * (begin + lane) + byte, raw[4 * lane + 4 - width + byte])
