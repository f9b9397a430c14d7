"""Codes whose top bits are codes too, group by group: found, and cut down."""

from __future__ import annotations

import numpy as np

from alphaq.formats.kernels import pack_group, unpack_group
from alphaq.quantizers.kernels import _least_biased, _range, rows_kernel
from alphaq.simd.codes import (
    CODES,
    add_products,
    address_of,
    less_128,
    no_products,
    ones,
    pack,
    right_by,
    unpack,
    whole_sum,
)
from alphaq.simd.vectors import (
    LANES,
    as_half,
    fma,
    kernel,
    lane_maximum,
    lane_minimum,
    lane_sum,
    load,
    maximum,
    minimum,
    nearest,
    splat,
    store_bytes,
    where_less,
)

_WIDEST = 8


@kernel
def _nested_group(values, codes, count, bits, symmetric, begin, place, more, shrinks, worth, bias_weight):
    """Levels s·(q − 2^(bits − 1) + ½) of the least errors at all widths together.

    shrinks: float32 [16], fractions of the full range to try. worth: float32 [9], what a unit of squared error weighs
    at each width; 0 for those that are not to be cut down to. Weights that lie on such a grid of at most 8 bits already
    keep the top bits of their codes.
    """
    lowest, highest, smallest = _range(values, count)
    size = max(highest, -lowest)
    step, width = _own_grid(values, count, bits, smallest, size)
    if step == 0:
        step, width = _joint_step(values, count, bits, size, shrinks, worth), bits
    scale, found = _encode_nested(values, count, bits, width, step, bias_weight, codes)
    return scale, np.float32(0), found


nest_rows = rows_kernel(_nested_group)


@kernel
def _floor(value):
    """Whole numbers below, of values that are no multiple of a step smaller than 2^-9."""
    return nearest(value - splat(np.float32(0.5 - 2.0**-10)))


@kernel
def _level(value, inverse, half):
    """Levels at odd halves, of weights that a step's inverse turns into multiples of it."""
    none = splat(np.float32(0))
    inside = minimum(maximum(value * inverse, none - half), half - splat(np.float32(0.25)))
    below = nearest(inside - splat(np.float32(0.5)))
    return below + splat(np.float32(0.5))


@kernel
def _own_grid(values, count, bits, smallest, size):
    """Step and bits of the coarsest grid of this kind that holds all weights exactly; (0, 0) if there is none."""
    if smallest < np.inf:
        for odd in range(1, 2**_WIDEST, 2):
            step = as_half(np.float32(2) * smallest / np.float32(odd))
            if step == 0 or size * np.float32(2) > np.float32(2**_WIDEST - 1) * step * np.float32(1.001):
                break
            if step * np.float32(0.5) * np.float32(odd) == smallest and _is_nested(values, count, step):
                width = bits
                while np.float32(2**width - 1) * step * np.float32(0.5) < size:
                    width += 1
                return step, width
    return np.float32(0), bits


@kernel
def _is_nested(values, count, step):
    """Whether all weights are odd multiples of half a step."""
    half = np.float32(0.5)
    for at in range(count):  # noqa: SIM110 (numba has no such generators)
        if (np.rint(values[at] / step - half) + half) * step != values[at]:
            return False
    return True


@kernel
def _joint_step(values, count, bits, size, shrinks, worth):
    """The step of least Σ over widths of worth · Σ(w − ŵ)², where a width's levels are the top bits of the codes."""
    none = splat(np.float32(0))
    half = np.float32(2 ** (bits - 1))
    candidates = as_half(splat(size / (half - np.float32(0.5))) * load(shrinks, 0))
    inverses = where_less(none, candidates, splat(np.float32(1)) / candidates, none)
    total = none
    for width in range(2, bits + 1):
        if worth[width] > 0:
            cut = splat(np.float32(2.0 ** (width - bits)))
            product, square, energy = none, none, none
            for at in range(count):
                value = splat(values[at])
                level = _level(value, inverses, splat(half))
                if width < bits:
                    level = _floor(level * cut) + splat(np.float32(0.5))
                product = fma(value, level, product)
                square = fma(level, level, square)
                energy = fma(value, value, energy)
            error = energy - product * product / square
            total = fma(splat(worth[width]), error, total)
    least = lane_minimum(total)
    return lane_maximum(where_less(splat(least), total, none, candidates))


@kernel
def _encode_nested(values, count, bits, width, step, bias_weight, codes):
    """Codes of one group, the top `bits` of those that a step gives in `width` bits: their scale, and Σ(w − ŵ)²."""
    none = splat(np.float32(0))
    half = splat(np.float32(2 ** (width - 1)))
    inverse = splat(np.float32(1) / step if step > 0 else np.float32(0))
    cut, middle = splat(np.float32(2.0 ** (bits - width))), splat(np.float32(2 ** (bits - 1)) - np.float32(0.5))
    product, square, energy = none, none, none
    whole = count // LANES * LANES
    for at in range(0, count, LANES):
        value = load(values, at)
        level = _level(value, inverse, half)
        if bits < width:
            level = _floor(level * cut) + splat(np.float32(0.5))
        store_bytes(codes, at, level + middle)
        if at < whole:
            product = fma(value, level, product)
            square = fma(level, level, square)
            energy = fma(value, value, energy)
    along, squares, total = lane_sum(product) * 1.0, lane_sum(square) * 1.0, lane_sum(energy) * 1.0
    for at in range(whole, count):
        level = np.float64(codes[at]) - 2.0 ** (bits - 1) + 0.5
        along += values[at] * level
        squares += level * level
        total += np.float64(values[at]) * values[at]
    scale = step if bits == width else as_half(step * np.float32(2.0 ** (width - bits)))
    fitted = as_half(np.float32(_least_biased(along, squares, total, total, bias_weight)))
    exact = bits == width and along == squares * step
    if fitted > 0 and not exact:
        scale = fitted
    error = 0.0
    for at in range(count):
        miss = (np.float64(codes[at]) - 2.0 ** (bits - 1) + 0.5) * scale - values[at]
        error += miss * miss
    return scale, error


@kernel
def cut_rows(packed, columns, bits, group_size, steps, width, bias_weight, cut, scales, energy):
    """Keep the top `width` bits of the codes of whole rows; returns Σ(ŵ − ŵ')² in float64.

    packed: uint8 [rows · bytes per row], codes of `bits` bits on steps, float32 [rows · groups]. cut: uint8 [rows ·
    bytes per row of that width], zeroed. scales: float32 [rows · groups], become those that fit what the codes stood
    for. energy: float64 [1], becomes Σŵ². bias_weight: as for `nest_rows`. Products of levels are exact.
    """
    groups = -(-columns // group_size)
    rows = steps.size // groups
    row_bytes, cut_bytes = 4 * -(-columns * bits // 32), 4 * -(-columns * width // 32)
    codes = np.empty(group_size + LANES, np.uint8)
    eights = codes.view(np.uint64)
    drop = bits - width
    middle, middle_cut = 2.0 ** (bits - 1) - 0.5, 2.0 ** (width - 1) - 0.5
    unit = 2.0 if width == 1 else 1.0  # levels of single bits are ±1
    error, energy[0] = 0.0, 0.0
    for row in range(rows):
        for group in range(groups):
            begin = group * group_size
            count = min(group_size, columns - begin)
            source, target = row * row_bytes + begin * bits // 8, row * cut_bytes + begin * width // 8
            if count % CODES == 0:
                own, tops, both, own_square, top_square = _cut_whole(packed, source, count, bits, width, cut, target)
            else:
                own, tops, both, own_square, top_square = 0, 0, 0, 0, 0
                unpack_group(packed, source, (row + 1) * row_bytes, count, bits, eights)
                for at in range(count):
                    code = np.int64(codes[at])
                    top = code >> drop
                    codes[at] = top
                    own += code
                    tops += top
                    both += code * top
                    own_square += code * code
                    top_square += top * top
                pack_group(codes, eights, count, width, cut, target, (row + 1) * cut_bytes)
            step = np.float64(steps[row * groups + group])
            along = both - middle_cut * own - middle * tops + count * middle * middle_cut
            square = top_square - 2 * middle_cut * tops + count * middle_cut * middle_cut
            size = step * step * (own_square - 2 * middle * own + count * middle * middle)
            fitted, against = unit * step * along, unit * unit * square
            scale = as_half(np.float32(_least_biased(fitted, against, size, size, bias_weight)))
            if not scale > 0:
                scale = as_half(np.float32(step * 2.0**drop / unit))
            scales[row * groups + group] = scale
            error += scale * (scale * against - 2.0 * fitted) + size
            energy[0] += size
    return error


@kernel
def _cut_whole(packed, source, count, bits, width, cut, target):
    """Cut a group of whole vectors of codes q to p: Σq, Σp, Σq·p, Σq², Σp²."""
    own, tops, both, own_square, top_square = no_products(), no_products(), no_products(), no_products(), no_products()
    one = ones()
    for block in range(count // CODES):
        code = unpack(address_of(packed, source + 8 * bits * block), bits)
        top = right_by(code, bits - width)
        pack(address_of(cut, target + 8 * width * block), width, top)
        own, tops = add_products(own, code, one), add_products(tops, top, one)
        both = add_products(both, code, top)
        own_square, top_square = add_products(own_square, code, less_128(code)), add_products(top_square, top, top)
    total = whole_sum(own)
    return total, whole_sum(tops), whole_sum(both), whole_sum(own_square) + 128 * total, whole_sum(top_square)
