"""Multiply with matrices that are kept in 16 bits."""

from __future__ import annotations

import numpy as np

from alphaq.runtime.block_kernels import TASK_ROWS
from alphaq.simd.codes import brains_at, byte_at, half_at, halves_at
from alphaq.simd.vectors import LANES, fma, kernel, lane_sum, load, splat


@kernel
def multiply_kept(address, half, rows, columns, first, mine, values, out, column, pairs):
    """`kernels.multiply_block` for float16 (`half`) or bfloat16; values: the inputs, float32 [tokens, padded]."""
    whole = columns // LANES * LANES
    for row in range(first, min(first + TASK_ROWS, rows)):
        source = address + 2 * row * columns
        for index in range(mine.size):
            inputs = values[mine[index]]
            even, odd = splat(np.float32(0)), splat(np.float32(0))
            for at in range(0, whole - LANES, 2 * LANES):
                place = source + 2 * at
                even = fma(halves_at(place) if half else brains_at(place), load(inputs, at), even)
                place += 2 * LANES
                odd = fma(halves_at(place) if half else brains_at(place), load(inputs, at + LANES), odd)
            if whole // LANES % 2:
                place = source + 2 * (whole - LANES)
                even = fma(halves_at(place) if half else brains_at(place), load(inputs, whole - LANES), even)
            total = lane_sum(even + odd)
            for at in range(whole, columns):
                total += inputs[at] * (half_at(source + 2 * at) if half else _brain_at(source + 2 * at))
            out[pairs[index], column + row] = total


@kernel
def _brain_at(address):
    """One bfloat16 at an address as float32."""
    word = np.empty(1, np.uint32)
    word[0] = np.uint32(byte_at(address) << 16 | byte_at(address + 1) << 24)
    return word.view(np.float32)[0]
