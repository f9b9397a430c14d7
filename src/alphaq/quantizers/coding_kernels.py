"""Streams of b-bit codes as bytes of whole symbols, and back, at memory speed.

Eight symbols of w bits are w bytes, so a row is worked off eight symbols at a time.
"""

from __future__ import annotations

import numpy as np

from alphaq.simd.vectors import kernel


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
