"""Quantize, pack and unpack at memory speed: a group is read once, searched in registers, written packed.

The search tries sixteen steps at a time, one per vector lane, so that no sum crosses lanes and a
group may have any length. Codes go straight into the packed stream, least significant bit first.
The tests' oracle is the same search in plain torch.
"""

from __future__ import annotations

import numpy as np

from alphaq.simd import (
    LANES,
    as_brain,
    as_half,
    fma,
    kernel,
    lane_maximum,
    lane_minimum,
    lane_sum,
    load,
    load_bytes,
    load_some,
    magnitude,
    maximum,
    minimum,
    nearest,
    splat,
    store,
    store_bytes,
    where_less,
)

REFITS = 4
_LOW_8 = np.uint64(0x00FF00FF00FF00FF)
_LOW_16 = np.uint64(0x0000FFFF0000FFFF)
_LOW_32 = np.uint64(0x00000000FFFFFFFF)


@kernel
def quantize_rows(weight, columns, bits, group_size, symmetric, shrinks, packed, scales, offsets, largest):
    """Quantize whole rows of a flat matrix; returns Σ(w − ŵ)² in float64.

    weight: float32, float16 or bfloat16 bits. shrinks: float32 [16], fractions of the full range to try.
    packed: uint8 [rows · bytes per row], zeroed. scales, offsets: float32 [rows · groups], as stored.
    largest: float32 [1], becomes max |w|, or NaN if a weight is NaN or infinite.
    """
    rows = weight.size // columns
    groups = -(-columns // group_size)
    row_bytes = 4 * -(-columns * bits // 32)
    values = np.empty(group_size + LANES, np.float32)
    codes = np.empty(group_size + LANES, np.uint8)
    eights = codes.view(np.uint64)
    zero = splat(np.float32(0))
    extent, spoiled = zero, zero
    error = 0.0
    for row in range(rows):
        for group in range(groups):
            begin = group * group_size
            count = min(group_size, columns - begin)
            source = row * columns + begin
            whole = count // LANES * LANES
            for at in range(0, whole, LANES):
                store(values, at, load(weight, source + at))
            if whole < count:
                store(values, whole, load_some(weight[: source + count], source + whole))
            for at in range(0, count, LANES):
                value = load(values, at)
                extent = maximum(extent, magnitude(value))
                spoiled = fma(value, zero, spoiled)
            if bits == 1:
                scale, offset, found = _one_bit(values, count, symmetric, codes)
            else:
                scale, offset, found = _search(values, count, bits, symmetric, shrinks, codes)
            scales[row * groups + group] = scale
            offsets[row * groups + group] = offset
            error += found
            _pack(codes, eights, count, bits, packed, row * row_bytes + begin * bits // 8, (row + 1) * row_bytes)
    largest[0] = lane_maximum(extent) + lane_sum(spoiled)
    return error


@kernel
def _search(values, count, bits, symmetric, shrinks, codes):
    """Best step of one group: scale, zero point and squared error; codes become q."""
    top = np.float32(2**bits - 1)
    low, high = splat(np.float32(0)), splat(np.float32(0))
    for at in range(0, count, LANES):
        low = minimum(low, load(values, at))
        high = maximum(high, load(values, at))
    lowest, highest = lane_minimum(low), lane_maximum(high)
    if symmetric:
        zero = np.float32(2 ** (bits - 1))
        widest = max(highest, -lowest) / (top - zero)
    else:
        widest = (highest - lowest) / top
        zero = min(top, np.float32(np.rint(-lowest / widest))) if widest > 0 else np.float32(0)
    none = splat(np.float32(0))
    candidates = as_half(splat(widest) * load(shrinks, 0))
    inverses = where_less(none, candidates, splat(np.float32(1)) / candidates, none)
    errors = _errors(values, count, candidates, inverses, splat(-zero), splat(top - zero))
    best_error = lane_minimum(errors)
    best = lane_maximum(where_less(splat(best_error), errors, none, candidates))
    fitted = _least_squares(values, count, best, -zero, top - zero)
    refined = _encode(values, count, fitted, zero, top, codes)
    if not refined < best_error:
        refined = _encode(values, count, best, zero, top, codes)
        fitted = best
    if refined > 0 and _is_one_value(values, count):
        single = as_half(max(highest, -lowest))
        exact = _encode(values, count, single, zero, top, codes)
        if exact < refined:
            return single, zero, np.float64(exact)
        _encode(values, count, fitted, zero, top, codes)
    return fitted, zero, np.float64(refined)


@kernel
def _is_one_value(values, count):
    """Whether all weights that are not 0 are equal."""
    one = np.float32(0)
    for at in range(count):
        if values[at] != 0:
            if one != 0 and values[at] != one:
                return False
            one = values[at]
    return True


@kernel
def _inverse(scale):
    """1/scale; a scale of 0 (a group of zeros, or float16 underflow) makes every level 0."""
    return np.float32(1) / scale if scale > 0 else np.float32(0)


@kernel
def _errors(values, count, scale, inverse, lowest, highest):
    """Σ(w − ŵ)² for sixteen scales, one per lane."""
    even, odd = splat(np.float32(0)), splat(np.float32(0))
    down = splat(np.float32(0)) - scale
    for at in range(0, count - 1, 2):
        value = splat(values[at])
        miss = fma(minimum(maximum(nearest(value * inverse), lowest), highest), down, value)
        even = fma(miss, miss, even)
        value = splat(values[at + 1])
        miss = fma(minimum(maximum(nearest(value * inverse), lowest), highest), down, value)
        odd = fma(miss, miss, odd)
    if count % 2:
        value = splat(values[count - 1])
        miss = fma(minimum(maximum(nearest(value * inverse), lowest), highest), down, value)
        even = fma(miss, miss, even)
    return even + odd


@kernel
def _least_squares(values, count, scale, lowest, highest):
    """The step that fits the levels of a step best: Σ w·(q − z) / Σ (q − z)², as stored."""
    inverse, bottom, top = splat(_inverse(scale)), splat(lowest), splat(highest)
    product, square = splat(np.float32(0)), splat(np.float32(0))
    for at in range(0, count, LANES):
        value = load(values, at)
        level = minimum(maximum(nearest(value * inverse), bottom), top)
        product = fma(value, level, product)
        square = fma(level, level, square)
    return as_half(lane_sum(product) / max(lane_sum(square), np.float32(1)))


@kernel
def _encode(values, count, scale, zero, top, codes):
    """Write the codes q of one scale; returns Σ(w − ŵ)². Padding is 0 and costs nothing."""
    inverse, step, shift = splat(_inverse(scale)), splat(scale), splat(zero)
    bottom, ceiling = splat(-zero), splat(top - zero)
    error = splat(np.float32(0))
    for at in range(0, count, LANES):
        value = load(values, at)
        level = minimum(maximum(nearest(value * inverse), bottom), ceiling)
        miss = level * step - value
        error = fma(miss, miss, error)
        store_bytes(codes, at, level + shift)
    return lane_sum(error)


@kernel
def _one_bit(values, count, symmetric, codes):
    """Two levels offset ± scale split at the mean (at zero if symmetric): scale, offset, squared error."""
    length = np.float32(count)
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    total, size = zero, zero
    for at in range(0, count, LANES):
        total = total + load(values, at)
        size = size + magnitude(load(values, at))
    whole = lane_sum(total)
    split = np.float32(0) if symmetric else whole / length
    border = splat(split)
    above, number = zero, zero
    for at in range(0, count, LANES):
        value = load(values, at)
        above = above + where_less(border, value, value, zero)
        number = number + where_less(border, value, one, zero)
    if symmetric:
        scale, offset = as_half(lane_sum(size) / length), np.float32(0)
    else:
        # Padding is 0: where the mean is negative it counts as above, and has to be taken out.
        padding = np.float32(-count % LANES) if split < 0 else np.float32(0)
        high_count = lane_sum(number) - padding
        high_sum = lane_sum(above)
        low = (whole - high_sum) / max(length - high_count, np.float32(1))
        high = high_sum / high_count if high_count > 0 else low
        scale, offset = as_half((high - low) / np.float32(2)), as_half((high + low) / np.float32(2))
    error = 0.0
    for at in range(count):
        codes[at] = values[at] > split
        level = np.float32(codes[at])
        miss = (np.float32(2) * level - np.float32(1)) * scale + offset - values[at]
        error += miss * miss
    return scale, offset, error


@kernel
def _pack(codes, eights, count, bits, packed, at, end):
    """Write codes as a stream of bits from byte `at` on, eight codes becoming `bits` bytes at a time.

    eights: the codes seen as uint64. Three steps halve the number of gaps between the codes.
    """
    for index in range(count, -(-count // 8) * 8):
        codes[index] = 0
    width = np.uint64(bits)
    first, second, third = np.uint64(8) - width, np.uint64(16) - 2 * width, np.uint64(32) - 4 * width
    for index in range(-(-count // 8)):
        value = eights[index]
        value = (value & _LOW_8) | ((value & ~_LOW_8) >> first)
        value = (value & _LOW_16) | ((value & ~_LOW_16) >> second)
        value = (value & _LOW_32) | ((value & ~_LOW_32) >> third)
        for byte in range(min(bits, end - at)):
            packed[at + byte] = np.uint8(value & np.uint64(255))
            value >>= np.uint64(8)
        at += bits


@kernel
def _unpack(packed, at, end, count, bits, eights):
    """The inverse of `_pack`."""
    width = np.uint64(bits)
    first, second, third = np.uint64(8) - width, np.uint64(16) - 2 * width, np.uint64(32) - 4 * width
    low_8, low_16, low_32 = _LOW_8 >> first, _LOW_16 >> second, _LOW_32 >> third
    for index in range(-(-count // 8)):
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
            _unpack(packed, row * row_bytes + begin * bits // 8, (row + 1) * row_bytes, count, bits, eights)
            scale, offset = scales[row * groups + group], offsets[row * groups + group]
            if bits == 1:
                step, zero, start = splat(np.float32(2) * scale), splat(np.float32(0)), splat(offset - scale)
            else:
                step, zero, start = splat(scale), splat(offset), splat(np.float32(0))
            target = row * columns + begin
            whole = count // LANES * LANES
            for at in range(0, whole, LANES):
                store(out, target + at, (load_bytes(codes, at) - zero) * step + start)
            if whole < count:
                store(values, 0, (load_bytes(codes, whole) - zero) * step + start)
                for lane in range(count - whole):
                    out[target + whole + lane] = values[lane]


@kernel
def refit_rows(weight, columns, bits, group_size, symmetric, rounded, brain, packed, scales, offsets):
    """Quantize rows again on the grids that 16-bit scales allow, from RTN's; returns Σ(w − ŵ)² in float64.

    weight: as for `quantize_rows`. symmetric: ŵ = s·(q − 2^(b−1)); else ŵ = s·q + β with a free β. rounded: ŵ itself
    has 16 bits. brain: 16 bits are bfloat16's, else float16's. packed: uint8 [rows · bytes per row]. scales, offsets:
    float32 [rows · groups], RTN's scales and zero points, which become the scales and β of 16 bits.
    """
    rows = weight.size // columns
    groups = -(-columns // group_size)
    row_bytes = 4 * -(-columns * bits // 32)
    values = np.empty(group_size, np.float32)
    codes = np.empty(group_size, np.uint8)
    eights = codes.view(np.uint64)
    top = np.float32(2**bits - 1)
    zero = np.float32(2 ** (bits - 1)) if symmetric else np.float32(0)
    error = 0.0
    for row in range(rows):
        for group in range(groups):
            begin = group * group_size
            count = min(group_size, columns - begin)
            for at in range(0, count, LANES):
                store(values, at, load(weight, row * columns + begin + at))
            place = row * groups + group
            scale = _narrow(scales[place], brain)
            offset = np.float32(0) if symmetric else _narrow(-scale * offsets[place], brain)
            least = _encode_affine(values, count, scale, offset, zero, top, rounded, brain, codes)
            for _ in range(REFITS):
                better, start = _fit_affine(values, codes, count, zero, symmetric, brain)
                found = _encode_affine(values, count, better, start, zero, top, rounded, brain, codes)
                if not found < least:
                    _encode_affine(values, count, scale, offset, zero, top, rounded, brain, codes)
                    break
                scale, offset, least = better, start, found
            scales[place] = scale
            offsets[place] = offset
            error += least
            _pack(codes, eights, count, bits, packed, row * row_bytes + begin * bits // 8, (row + 1) * row_bytes)
    return error


@kernel
def _narrow(value, brain):
    """Rounded to bfloat16 or float16."""
    return as_brain(value) if brain else as_half(value)


@kernel
def _encode_affine(values, count, scale, offset, zero, top, rounded, brain, codes):
    """Write the codes nearest to whole lanes of values on a grid scale·(q − zero) + offset; returns Σ(w − ŵ)²."""
    inverse, step, start, shift = splat(_inverse(scale)), splat(scale), splat(offset), splat(zero)
    bottom, ceiling = splat(-zero), splat(top - zero)
    error = splat(np.float32(0))
    for at in range(0, count, LANES):
        value = load(values, at)
        level = minimum(maximum(nearest((value - start) * inverse), bottom), ceiling)
        restored = level * step + start
        if rounded:
            restored = _narrow(restored, brain)
        miss = restored - value
        error = fma(miss, miss, error)
        store_bytes(codes, at, level + shift)
    return np.float64(lane_sum(error))


@kernel
def _fit_affine(values, codes, count, zero, symmetric, brain):
    """Least-squares scale and offset of given codes, in 16 bits; the offset is fitted to the rounded scale."""
    shift, none = splat(zero), splat(np.float32(0))
    total, product, sum_, square = none, none, none, none
    for at in range(0, count, LANES):
        value, level = load(values, at), load_bytes(codes, at) - shift
        total = total + value
        sum_ = sum_ + level
        product = fma(value, level, product)
        square = fma(level, level, square)
    both, squares = np.float64(lane_sum(product)), np.float64(lane_sum(square))
    if symmetric:
        return _narrow(np.float32(both / max(squares, 1.0)), brain), np.float32(0)
    middle, mean = np.float64(lane_sum(sum_)) / count, np.float64(lane_sum(total)) / count
    spread = squares - count * middle * middle
    scale = _narrow(np.float32((both - count * middle * mean) / spread if spread > 0 else 0.0), brain)
    return scale, _narrow(np.float32(mean - scale * middle), brain)
