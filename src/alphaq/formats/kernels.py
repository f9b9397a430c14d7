"""Codes to packed streams and back, packed rows to values, and streams to symbols, at memory speed.

Codes go into a stream least significant bit first, a group at a time. What they stand for is written inline
(`formats.base.Levels`). Eight symbols of w bits are w bytes, so planes are worked off eight symbols at a time.
"""

from __future__ import annotations

import numpy as np

from alphaq.formats.packing import MIDDLE, UNUSED
from alphaq.simd.codes import CODES, address_of, codes_at, pack, put_codes, unpack
from alphaq.simd.vectors import LANES, kernel, load_bytes, splat, store

_LOW_8 = np.uint64(0x00FF00FF00FF00FF)
_LOW_16 = np.uint64(0x0000FFFF0000FFFF)
_LOW_32 = np.uint64(0x00000000FFFFFFFF)


@kernel
def pack_group(codes, eights, count, bits, packed, at, end):
    """Write codes as a stream of bits from byte `at` on, eight codes becoming `bits` bytes.

    eights: the codes seen as uint64. Three steps halve the number of gaps between the codes.
    """
    for index in range(count, -(-count // 8) * 8):
        codes[index] = 0
    whole = count // CODES
    for block in range(whole):
        pack(address_of(packed, at), bits, codes_at(address_of(codes, block * CODES)))
        at += 8 * bits
    width = np.uint64(bits)
    first, second, third = np.uint64(8) - width, np.uint64(16) - 2 * width, np.uint64(32) - 4 * width
    for index in range(whole * CODES // 8, -(-count // 8)):
        value = eights[index]
        value = (value & _LOW_8) | ((value & ~_LOW_8) >> first)
        value = (value & _LOW_16) | ((value & ~_LOW_16) >> second)
        value = (value & _LOW_32) | ((value & ~_LOW_32) >> third)
        for byte in range(min(bits, end - at)):
            packed[at + byte] = np.uint8(value & np.uint64(255))
            value >>= np.uint64(8)
        at += bits


@kernel
def unpack_group(packed, at, end, count, bits, eights):
    """The inverse of `pack_group`."""
    whole = count // CODES
    for block in range(whole):
        put_codes(address_of(eights, block * CODES // 8), unpack(address_of(packed, at), bits))
        at += 8 * bits
    width = np.uint64(bits)
    first, second, third = np.uint64(8) - width, np.uint64(16) - 2 * width, np.uint64(32) - 4 * width
    low_8, low_16, low_32 = _LOW_8 >> first, _LOW_16 >> second, _LOW_32 >> third
    for index in range(whole * CODES // 8, -(-count // 8)):
        value = np.uint64(0)
        for byte in range(min(bits, end - at)):
            value |= np.uint64(packed[at + byte]) << np.uint64(8 * byte)
        at += bits
        value = (value & low_32) | ((value & ~low_32) << third)
        value = (value & low_16) | ((value & ~low_16) << second)
        eights[index] = (value & low_8) | ((value & ~low_8) << first)


@kernel
def dequantize_rows(packed, columns, bits, group_size, scales, offsets, out):
    """Values of whole packed rows, float32 [rows · columns]: s·(q − z), or offset ± s for 1 bit.

    packed: uint8 [rows · bytes per row]. scales, offsets: float32 [rows · groups].
    """
    rows = out.size // columns
    groups = -(-columns // group_size)
    row_bytes = 4 * -(-columns * bits // 32)
    codes = np.empty(group_size + LANES, np.uint8)
    eights = codes.view(np.uint64)
    values = np.empty(group_size + LANES, np.float32)
    for row in range(rows):
        for group in range(groups):
            begin = group * group_size
            count = min(group_size, columns - begin)
            unpack_group(packed, row * row_bytes + begin * bits // 8, (row + 1) * row_bytes, count, bits, eights)
            scale, offset = scales[row * groups + group], offsets[row * groups + group]
            _restore_group(codes, count, bits, scale, offset, values, out, row * columns + begin)


@kernel
def _restore_group(codes, count, bits, scale, offset, values, out, target):
    """Write the values of one group from `target` on. values: room for sixteen."""
    if bits == 1:
        step, zero, start = splat(np.float32(2) * scale), splat(np.float32(0)), splat(offset - scale)
    else:
        step, zero, start = splat(scale), splat(offset), splat(np.float32(0))
    whole = count // LANES * LANES
    for at in range(0, whole, LANES):
        store(out, target + at, (load_bytes(codes, at) - zero) * step + start)
    if whole < count:
        store(values, 0, (load_bytes(codes, whole) - zero) * step + start)
        for lane in range(count - whole):
            out[target + whole + lane] = values[lane]


@kernel
def dequantize_widths(packed, columns, widths, group_size, scales, offsets, out):
    """`dequantize_rows` where each group has its own bits, uint8 [groups], and begins where the last one ends."""
    rows = out.size // columns
    groups = widths.size
    row_bytes = packed.size // rows
    codes = np.empty(group_size + LANES, np.uint8)
    eights = codes.view(np.uint64)
    values = np.empty(LANES, np.float32)
    for row in range(rows):
        source = row * row_bytes
        for group in range(groups):
            bits = np.int64(widths[group])
            count = min(group_size, columns - group * group_size)
            unpack_group(packed, source, (row + 1) * row_bytes, count, bits, eights)
            place = row * groups + group
            _restore_group(
                codes, count, bits, scales[place], offsets[place], values, out, row * columns + group * group_size
            )
            source += group_size * bits // 8


@kernel
def restore_salient(positions, values, scales, most, columns, group_size, out):
    """Put salient weights in their places in whole rows, float32 [rows · columns]: scale·(value − 128).

    positions, values: uint8 [rows · groups · most]. scales: float32 [rows · groups].
    """
    groups = -(-columns // group_size)
    for place in range(scales.size):
        begin = place // groups * columns + place % groups * group_size
        for at in range(place * most, (place + 1) * most):
            if positions[at] != UNUSED:
                out[begin + positions[at]] = (np.float32(values[at]) - np.float32(MIDDLE)) * scales[place]


@kernel
def split_rows(packed, row_bytes, width, symbols):
    """Cut each row of a flat plane into symbols of `width` bits, least significant first, the last padded with zeros.

    packed: uint8 [rows · row_bytes]. symbols: uint8 [rows · ⌈8 · row_bytes / width⌉], filled.
    """
    mask = np.uint64(2**width - 1)
    count = -(-8 * row_bytes // width)
    for row in range(packed.size // row_bytes):
        source, end, target, left = row * row_bytes, (row + 1) * row_bytes, row * count, count
        while left > 0:
            value = np.uint64(0)
            for byte in range(min(width, end - source)):
                value |= np.uint64(packed[source + byte]) << np.uint64(8 * byte)
            source += width
            for index in range(min(8, left)):
                symbols[target + index] = np.uint8(value & mask)
                value >>= np.uint64(width)
            target += 8
            left -= 8


@kernel
def join_rows(symbols, row_bytes, width, packed):
    """The inverse of `split_rows`; bits of symbols beyond `width` or a row's end are dropped."""
    mask = np.uint64(2**width - 1)
    count = -(-8 * row_bytes // width)
    for row in range(packed.size // row_bytes):
        source, target, end, left = row * count, row * row_bytes, (row + 1) * row_bytes, count
        while left > 0:
            value = np.uint64(0)
            for index in range(min(8, left)):
                value |= (np.uint64(symbols[source + index]) & mask) << np.uint64(width * index)
            source += 8
            left -= 8
            for byte in range(min(width, end - target)):
                packed[target + byte] = np.uint8(value & np.uint64(255))
                value >>= np.uint64(8)
            target += width
