# mypy: disallow-untyped-defs=False
"""The kernel of `alphaq.quantizers.hqq`: sixteen grids at a time, one per vector lane, judged by Σ|w − ŵ|^p.

Half-quadratic steps then move the best grid; there the lanes are weights, and misses are in steps of the grid.
"""

from __future__ import annotations

import numpy as np

from alphaq.quantizers.kernels import (
    _common_step,
    _encode,
    _encode_two,
    _inverse,
    _one_bit,
    _range,
    rows_kernel,
)
from alphaq.simd.vectors import (
    LANES,
    as_half,
    copysign,
    fma,
    kernel,
    lane_sum,
    load,
    magnitude,
    maximum,
    minimum,
    nearest,
    power,
    splat,
    store,
    where_less,
)

STRENGTH = np.float32(10)  # β of the first half-quadratic step
GROWTH = np.float32(1.3)  # κ, from one step to the next
STEPS = 2


@kernel
def _group_by_norm(values, codes, count, bits, symmetric, begin, place, more, table, slack, norm):
    """The grid of least Σ|w − ŵ|^norm.

    table: float32 [48], three times sixteen lanes: places between the widest and the narrowest step, then factors of
    the best step and shifts of its zero point to try next. For 1 bit see `_two_levels`. slack: how far, relative, steps
    may go beyond those whose codes just reach both ends of a group.
    """
    trials = np.empty(3 * LANES, np.float32)
    if bits == 1:
        return _two_levels(values, count, symmetric, table, norm, trials, codes)
    scale, offset = _grid(values, count, bits, symmetric, table, slack, norm, trials)
    return scale, offset, np.float64(_encode(values, count, scale, offset, np.float32(2**bits - 1), codes))


quantize_rows_by_norm = rows_kernel(_group_by_norm)


@kernel
def _grid(values, count, bits, symmetric, table, slack, norm, trials):
    """Scale and zero point of one group."""
    top, middle = np.float32(2**bits - 1), np.float32(2 ** (bits - 1))
    none, ceiling = splat(np.float32(0)), splat(top)
    lowest, highest, smallest = _range(values, count)
    common = _common_step(values, count, smallest, highest - lowest, top)
    below = middle if symmetric or common == 0 else min(top, np.float32(np.rint(-lowest / common)))
    if common > 0 and _is_exact(values, count, common, below, top):
        return common, below
    size = max(highest, -lowest) if symmetric else highest - lowest
    full = size / (top - middle if symmetric else top)
    widest = full * (np.float32(1) + slack)
    narrowest = size / (middle if symmetric else top) * (np.float32(1) - slack)
    steps = fma(splat(narrowest - widest), load(table, 0), splat(widest))
    if symmetric:
        zeros = splat(middle)
    else:
        zeros = minimum(nearest(where_less(none, steps, splat(-lowest) / steps, none)), ceiling)
    step, zero, least = _best(values, count, steps, zeros, top, norm, trials)
    if not least < np.inf:  # nothing but zeros, or steps below float16
        step, least = np.float32(0), _objective(values, count, np.float32(0), zero, top, norm)
    plain = middle if symmetric or full == 0 else np.float32(np.rint(-lowest / full))
    step, zero, least = _better(values, count, step, zero, least, as_half(full), plain, top, norm)
    step, zero, least = _better(values, count, step, zero, least, common, below, top, norm)
    if step == 0:
        return step, zero
    steps = minimum(maximum(splat(step) * load(table, LANES), splat(narrowest)), splat(widest))
    if not symmetric:
        zeros = minimum(maximum(splat(zero) + load(table, 2 * LANES), none), ceiling)
    other, shifted, found = _best(values, count, steps, zeros, top, norm, trials)
    if found < least:
        step, zero, least = other, shifted, found
    return _descend(values, count, step, zero, top, symmetric, norm, least, narrowest, widest)


@kernel
def _is_exact(values, count, step, zero, top):
    """Whether all weights lie on a grid."""
    for at in range(count):
        level = np.rint(values[at] / step)
        if level * step != values[at] or level < -zero or level > top - zero:
            return False
    return True


@kernel
def _best(values, count, steps, zeros, top, norm, trials):
    """Of sixteen grids the one with the least Σ|w − ŵ|^p: step, zero point and that sum. trials: [48], scratch."""
    steps = as_half(steps)
    bottoms = splat(np.float32(0)) - zeros
    store(trials, 0, steps)
    store(trials, LANES, zeros)
    store(trials, 2 * LANES, _objectives(values, count, steps, bottoms, splat(top) + bottoms, norm))
    best = _least(trials)
    return trials[best], trials[LANES + best], trials[2 * LANES + best]


@kernel
def _least(trials):
    """The lane whose objective is least, the first of several."""
    best = 0
    for lane in range(1, LANES):
        if trials[2 * LANES + lane] < trials[2 * LANES + best]:
            best = lane
    return best


@kernel
def _objectives(values, count, steps, bottoms, ceilings, norm):
    """Σ|w − ŵ|^p for sixteen grids, one per lane; infinite where the step is 0 or infinite."""
    none, far, exponent = splat(np.float32(0)), splat(np.float32(np.inf)), splat(norm)
    inverses, down = splat(np.float32(1)) / steps, none - steps
    total = none
    for at in range(count):
        value = splat(values[at])
        level = minimum(maximum(nearest(value * inverses), bottoms), ceilings)
        total = total + power(magnitude(fma(level, down, value)), exponent)
    return where_less(none, steps, where_less(steps, far, total, far), far)


@kernel
def _objective(values, count, step, zero, top, norm):
    """Σ|w − ŵ|^p of one grid; a step of 0 restores zeros."""
    inverse, bottom, ceiling = splat(_inverse(step)), splat(-zero), splat(top - zero)
    exponent, down = splat(norm), splat(-step)
    total = splat(np.float32(0))
    for at in range(0, count, LANES):
        value = load(values, at)
        level = minimum(maximum(nearest(value * inverse), bottom), ceiling)
        total = total + power(magnitude(fma(level, down, value)), exponent)
    return lane_sum(total)


@kernel
def _better(values, count, step, zero, least, other, shifted, top, norm):
    """The one of two grids with the least Σ|w − ŵ|^p, which is known of the first: step, zero point and that sum."""
    if other > 0:
        found = _objective(values, count, other, shifted, top, norm)
        if found < least:
            return other, shifted, found
    return step, zero, least


@kernel
def _descend(values, count, step, zero, top, symmetric, norm, least, narrowest, widest):
    """Move a grid by half-quadratic steps, as far as they lower Σ|w − ŵ|^p: step and zero point."""
    strength = STRENGTH
    for _ in range(STEPS):
        moved, shift = _half_quadratic(values, count, step, zero, top, norm, strength)
        moved = as_half(min(max(moved, narrowest), widest))
        start = zero if symmetric else min(max(zero + np.float32(np.rint(shift)), np.float32(0)), top)
        step, zero, least = _better(values, count, step, zero, least, moved, start, top, norm)
        strength *= GROWTH
    return step, zero


@kernel
def _half_quadratic(values, count, step, zero, top, norm, strength):
    """The step that fits best, and the shift of the zero point that does, once large errors are taken off.

    x = w/s − (q − z) becomes e + rest with e = sign(x) · max(|x| − |x|^(p−1)/β, 0); least squares on the rest.
    """
    inverse, bottom, ceiling = splat(_inverse(step)), splat(-zero), splat(top - zero)
    none, exponent, weakness = splat(np.float32(0)), splat(norm - np.float32(1)), splat(np.float32(1) / strength)
    product, square, drift = none, none, none
    for at in range(0, count, LANES):
        scaled = load(values, at) * inverse
        level = minimum(maximum(nearest(scaled), bottom), ceiling)
        miss = scaled - level
        size = magnitude(miss)
        taken = maximum(size - power(size, exponent) * weakness, none)
        target = scaled - copysign(taken, miss)
        product = fma(target, level, product)
        square = fma(level, level, square)
        drift = drift + (level - target)
    squares = lane_sum(square)
    factor = lane_sum(product) / squares if squares > 0 else np.float32(1)
    return step * factor, lane_sum(drift) / np.float32(count)


@kernel
def _two_levels(values, count, symmetric, table, norm, trials, codes):
    """Two levels offset ± scale: scale, offset and squared error; codes become q.

    From the levels of least squares, each is moved in turn. table: float32 [48], three times sixteen moves, in parts
    of half the distance between the levels; 0 is among them.
    """
    scale, offset, error = _one_bit(values, count, symmetric, codes)
    if not 0 < scale < np.inf:
        return scale, offset, error
    unit = np.float32(1) / scale
    for at in range(0, table.size, LANES):
        for side in range(1 if symmetric else 2):
            moves = splat(scale) * load(table, at)
            scales = as_half(splat(scale) + moves)
            sign = splat(np.float32(0 if symmetric else 1 - 2 * side))
            offsets = as_half(fma(sign, moves, splat(offset)))
            store(trials, 0, scales)
            store(trials, LANES, offsets)
            store(trials, 2 * LANES, _objectives_of_two(values, count, scales, offsets, unit, norm))
            best = _least(trials)
            scale, offset = trials[best], trials[LANES + best]
    return scale, offset, _encode_two(values, count, scale, offset, offset, codes)


@kernel
def _objectives_of_two(values, count, scales, offsets, unit, norm):
    """Σ|w − ŵ|^p for sixteen pairs of levels, times unit^p."""
    exponent, factor = splat(norm), splat(unit)
    total = splat(np.float32(0))
    for at in range(count):
        miss = magnitude(splat(values[at]) - offsets) - scales
        total = total + power(magnitude(miss) * factor, exponent)
    return total
