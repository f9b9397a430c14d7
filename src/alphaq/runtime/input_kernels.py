"""Inputs of packed products as whole numbers with a step for 128 neighbours, cut into signed bytes."""

from __future__ import annotations

import numpy as np

from alphaq.simd.codes import as_whole, put_digits, whole_sum, without_digit
from alphaq.simd.vectors import (
    LANES,
    fma,
    kernel,
    lane_maximum,
    lane_sum,
    load,
    magnitude,
    maximum,
    minimum,
    nearest,
    splat,
    store,
    where_less,
)

STEP_GROUP = 128  # inputs that share a step
LIMITS = (32639.0, 8355711.0)  # largest whole number that 2 and 3 signed bytes are cut from
SMALLEST = np.float32(1e-30)  # inputs below have no inverse in float32 and count as 0


@kernel
def widen(inputs, tokens, columns, values):
    """Inputs as float32 [tokens, padded], which come zeroed; returns whether two bytes are too few for them.

    inputs: flat [tokens · columns], float32, or bits of float16 or bfloat16. Few they are where most inputs of a group
    are smaller than a 256th of its largest: an outlier would take the bits of its neighbours.
    """
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    rest = np.zeros(LANES, inputs.dtype)
    coarse = False
    for token in range(tokens):
        end = columns // LANES * LANES
        row = values[token]
        for at in range(0, end, LANES):
            store(row, at, load(inputs, token * columns + at))
        if end < columns:
            for at in range(columns - end):
                rest[at] = inputs[token * columns + end + at]
            store(row, end, load(rest, 0))
        for begin in range(0, columns, STEP_GROUP):
            extent, small, number = zero, zero, zero
            for at in range(begin, begin + STEP_GROUP, LANES):
                extent = maximum(extent, magnitude(load(row, at)))
            border = splat(lane_maximum(extent) / np.float32(256))
            for at in range(begin, begin + STEP_GROUP, LANES):
                value = magnitude(load(row, at))
                number = number + where_less(zero, value, one, zero)
                small = small + where_less(zero, value, where_less(value, border, one, zero), zero)
            coarse |= lane_sum(small) > np.float32(0.5) * lane_sum(number)
    return coarse


@kernel
def prepare(values, columns, planes, limit, digits, steps, sums):
    """Inputs as whole numbers.

    values: float32 [tokens, padded], zero beyond the columns; padded: columns rounded up to 512. digits: int8
    [planes, tokens, padded]. steps, sums: float32 [3, tokens, padded / 32], σ and σ·Σn for groups of 32, 64 and 128.
    All come zeroed.
    """
    tokens, padded = values.shape
    bottom, top, none = splat(np.float32(-limit)), splat(np.float32(limit)), splat(np.float32(0))
    for token in range(tokens):
        row = values[token]
        for begin in range(0, columns, STEP_GROUP):
            extent, spoiled = none, none
            for at in range(begin, begin + STEP_GROUP, LANES):
                value = load(row, at)
                extent = maximum(extent, magnitude(value))
                spoiled = fma(value, none, spoiled)
            largest = lane_maximum(extent) + lane_sum(spoiled)
            fine = largest >= SMALLEST and largest < np.float32(np.inf)
            inverse = splat(np.float32(limit) / largest if fine else np.float32(0))
            step = np.float32(0) if largest < SMALLEST else np.float32(np.float64(largest) / limit)
            for part in range(4):
                total = np.int64(0)
                for at in range(begin + 32 * part, begin + 32 * part + 32, LANES):
                    value = load(row, at) if fine else none
                    whole = as_whole(minimum(maximum(nearest(value * inverse), bottom), top))
                    total += whole_sum(whole)
                    for plane in range(planes - 1, -1, -1):
                        put_digits(digits.ctypes.data + (plane * tokens + token) * padded + at, whole)
                        whole = without_digit(whole)
                sums[0, token, begin // 32 + part] = np.float32(np.float64(total) * step)
                steps[0, token, begin // 32 + part] = step
        for level in range(1, 3):
            for place in range(padded // 32 >> level):
                sums[level, token, place] = sums[level - 1, token, 2 * place] + sums[level - 1, token, 2 * place + 1]
                steps[level, token, place] = steps[level - 1, token, 2 * place]
