"""Multiply with matrices that are kept in 16 bits."""

from __future__ import annotations

import numpy as np

from alphaq.runtime.block_kernels import TASK_ROWS
from alphaq.runtime.integer_kernels import AHEAD
from alphaq.simd.codes import brains_at, byte_at, fetch, half_at, halves_at
from alphaq.simd.vectors import LANES, fma, kernel, lane_sum, load, splat


@kernel
def multiply_kept(address, half, rows, columns, first, mine, values, out, column, pairs):
    """`kernels.multiply_block` for float16 (`half`) or bfloat16; values: the inputs, float32 [tokens, padded]."""
    flat, padded = values.reshape(values.size), values.shape[1]
    whole = columns // LANES * LANES
    pairs_end = whole // (2 * LANES) * 2 * LANES
    for row in range(first, min(first + TASK_ROWS, rows)):
        for index in range(mine.size):
            source, at = address + 2 * row * columns, mine[index] * padded
            even, odd = splat(np.float32(0)), splat(np.float32(0))
            end = at + pairs_end
            while at < end:
                fetch(source + AHEAD)
                even = fma(halves_at(source) if half else brains_at(source), load(flat, at), even)
                place = source + 2 * LANES
                odd = fma(halves_at(place) if half else brains_at(place), load(flat, at + LANES), odd)
                source += 4 * LANES
                at += 2 * LANES
            if pairs_end < whole:
                even = fma(halves_at(source) if half else brains_at(source), load(flat, at), even)
            total = lane_sum(even + odd)
            if whole < columns:
                total = _add_rest(total, address + 2 * row * columns, half, whole, columns, values[mine[index]])
            out[pairs[index], column + row] = total


@kernel
def _add_rest(total, source, half, whole, columns, inputs):
    """Products beyond the last sixteen."""
    for at in range(whole, columns):
        total += inputs[at] * (half_at(source + 2 * at) if half else _brain_at(source + 2 * at))
    return total


@kernel
def _brain_at(address):
    """One bfloat16 at an address as float32."""
    word = np.empty(1, np.uint32)
    word[0] = np.uint32(byte_at(address) << 16 | byte_at(address + 1) << 24)
    return word.view(np.float32)[0]
