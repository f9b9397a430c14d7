# mypy: disallow-untyped-defs=False
"""Kernels of `alphaq.quantizers.salience`: two levels per group, and a few weights at 8 bits in the place of some."""

from __future__ import annotations

import numpy as np

from alphaq.formats.packing import UNUSED
from alphaq.quantizers.kernels import _inverse, _one_bit, _stretched_two, rows_kernel
from alphaq.simd.vectors import LANES, as_half, kernel, lane_maximum, load, maximum, splat

REFITS = 8


@kernel
def _salient_group(values, codes, count, bits, symmetric, begin, place, more, most, importance, bias_weight):
    """Two levels, and up to `most` weights at 8 bits.

    importance: float32 [columns], by which squared errors count. more: scales of the 8-bit weights, float32 [rows ·
    groups]; their positions and their values, uint8 [rows · groups · most], as stored.
    """
    wide, positions, stored = more
    held = slice(place * most, (place + 1) * most)
    scale, offset, wide[place], error = _levels_and_salient(
        values, count, symmetric, importance[begin:], bias_weight, codes, positions[held], stored[held]
    )
    return scale, offset, error


quantize_salient = rows_kernel(_salient_group)


@kernel
def _levels_and_salient(values, count, symmetric, importance, bias_weight, codes, positions, stored):
    """Scale and offset of two levels, scale of the salient weights, Σ(w − ŵ)²; codes, positions and stored are written.

    Levels without salient weights come first. If all but a few weights have two values, they are the levels. Else the
    weights that are missed most are taken out and the levels fitted to the rest, again and again while that helps.
    In the end they are stretched as those of plain groups.
    """
    scale, offset, _ = _one_bit(values, count, symmetric, codes)
    salient, best = np.zeros(count, np.uint8), np.zeros(count, np.uint8)
    step, least = np.float32(0), _miss(values, count, codes, scale, offset, salient, np.float32(0), importance)
    next_codes = codes[:count].copy()
    next_scale, next_offset = scale, offset
    known, split = _mark_odd(values, count, positions.size, salient)
    for _ in range(REFITS):
        if not known:
            split = next_offset
            _mark_missed(values, count, next_codes, next_scale, next_offset, importance, positions.size, salient)
            step_of_all = _wide_step(values, count, salient)
            _keep_helped(values, count, next_codes, next_scale, next_offset, step_of_all, salient)
        wide = _wide_step(values, count, salient)
        next_scale, next_offset = _fit_levels(values, count, symmetric, split, salient)
        for at in range(count):
            next_codes[at] = values[at] > next_offset
        error = _miss(values, count, next_codes, next_scale, next_offset, salient, wide, importance)
        if error < least:
            scale, offset, step, least = next_scale, next_offset, wide, error
            best[:] = salient
            codes[:count] = next_codes
        elif known:
            next_scale, next_offset = scale, offset
            next_codes[:] = codes[:count]
        else:
            break
        known = False
    used, error = 0, 0.0
    rest, signs = np.empty(count, np.float32), np.empty(count, np.uint8)
    positions[:], stored[:] = UNUSED, 128
    for at in range(count):
        if best[at]:
            positions[used], stored[used] = at, np.uint8(_nearest_wide(values[at], step) + np.float32(128))
            miss = (np.float32(stored[used]) - np.float32(128)) * step - values[at]
            error += miss * miss
            used += 1
        else:
            rest[at - used], signs[at - used] = values[at], codes[at]
    if least > 0:
        scale, offset, _ = _stretched_two(rest, signs, count - used, symmetric, bias_weight, scale, offset)
    for at in range(count - used):
        miss = _level(signs[at], scale, offset) - rest[at]
        error += miss * miss
    return scale, offset, step, error


@kernel
def _level(code, scale, offset):
    return (np.float32(2) * np.float32(code) - np.float32(1)) * scale + offset


@kernel
def _nearest_wide(value, step):
    """A salient weight's code, −127 to 127."""
    return min(max(np.rint(value * _inverse(step)), np.float32(-127)), np.float32(127))


@kernel
def _mark_odd(values, count, most, salient):
    """Mark what is not one of two values, if that is `most` weights or fewer: whether, and what lies between the two.

    A group that was quantized before is such, and restored exactly.
    """
    one, ones = _commonest(values, count, most + 1, np.float32(np.nan))
    other, others = _commonest(values, count, most + 1, one)
    if ones + others < count - most:
        return False, one
    for at in range(count):
        salient[at] = values[at] != one and values[at] != other
    return True, (one + other) / np.float32(2)


@kernel
def _commonest(values, count, tried, but):
    """Which of the first few weights (`tried`) other than `but` most weights are equal to, and how many."""
    found, number = but, 0
    for at in range(count):
        if values[at] == but:
            continue
        same = 0
        for place in range(count):
            same += values[place] == values[at]
        if same > number:
            found, number = values[at], same
        tried -= 1
        if tried == 0:
            break
    return found, number


@kernel
def _mark_missed(values, count, codes, scale, offset, importance, most, salient):
    """Mark the weights that two levels miss most."""
    salient[:] = 0
    missed = np.zeros(count + LANES, np.float32)
    for at in range(count):
        miss = _level(codes[at], scale, offset) - values[at]
        missed[at] = miss * miss * importance[at]
    for _ in range(min(most, count)):
        highest = splat(np.float32(0))
        for at in range(0, count, LANES):
            highest = maximum(highest, load(missed, at))
        furthest, place = lane_maximum(highest), 0
        if not furthest > 0:
            break
        while missed[place] != furthest:
            place += 1
        missed[place] = 0
        salient[place] = 1


@kernel
def _wide_step(values, count, salient):
    """Scale of the salient weights."""
    extent = np.float32(0)
    for at in range(count):
        if salient[at]:
            extent = max(extent, abs(values[at]))
    return as_half(extent / np.float32(127))


@kernel
def _keep_helped(values, count, codes, scale, offset, step, salient):
    """Unmark what 8 bits miss no less than two levels do."""
    for at in range(count):
        if salient[at]:
            wide = _nearest_wide(values[at], step) * step - values[at]
            miss = _level(codes[at], scale, offset) - values[at]
            salient[at] = wide * wide < miss * miss


@kernel
def _fit_levels(values, count, symmetric, split, salient):
    """Scale and offset of the two levels that fit the rest best, on either side of a split."""
    low, high, size = 0.0, 0.0, 0.0
    lows, highs = 0, 0
    for at in range(count):
        if salient[at]:
            continue
        size += abs(values[at])
        if values[at] > split:
            high += values[at]
            highs += 1
        else:
            low += values[at]
            lows += 1
    if symmetric:
        return as_half(np.float32(size / max(lows + highs, 1))), np.float32(0)
    high = high / highs if highs else low / max(lows, 1)
    low = low / lows if lows else high
    return as_half(np.float32((high - low) / 2)), as_half(np.float32((high + low) / 2))


@kernel
def _miss(values, count, codes, scale, offset, salient, step, importance):
    """Σ importance·(w − ŵ)² of one group."""
    error = 0.0
    for at in range(count):
        if salient[at]:
            miss = _nearest_wide(values[at], step) * step - values[at]
        else:
            miss = _level(codes[at], scale, offset) - values[at]
        error += miss * miss * importance[at]
    return error
