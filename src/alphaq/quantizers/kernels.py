"""Quantize, pack and unpack at memory speed: a group is read once, searched in registers, written packed.

The search tries sixteen steps at a time, one per vector lane, so that no sum crosses lanes and a
group may have any length. Codes go straight into the packed stream, least significant bit first.
The tests' oracle is the same search in plain torch.
"""

from __future__ import annotations

import numpy as np

from alphaq.formats.kernels import pack_group
from alphaq.simd.vectors import (
    LANES,
    as_brain,
    as_half,
    fma,
    kernel,
    kernel_over,
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
MOST_STRETCHED = 1.5  # times the least Σ(w − ŵ)²; with bias counting 4 times it is at most that
STRETCHED_SIZE = np.float32(2.0**28)  # weights up to 16384, levels below 32768


@kernel
def quantize_rows(weight, columns, bits, group_size, symmetric, settings, largest, packed, scales, offsets):
    """Quantize whole rows to the steps of least squared error, then stretched. The arguments of `_rows`.

    settings: shrinks, float32 [16], fractions of the full range to try, empty for the full range as it is (min–max);
    and bias_weight, float32, how many times errors along the weights count in scales. It keeps a loop of its own: by
    `rows_kernel`, a group here being so little work, it takes 5 to 18 % longer in groups of 128 and 13 to 26 % in
    groups of 32; written into the loop (numba's inline) still 11 % at min–max in groups of 32.
    """
    shrinks, bias_weight = settings
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
            extent, spoiled = _read(weight, row * columns + begin, count, values, extent, spoiled)
            if bits == 1:
                scale, offset, found = _one_bit(values, count, symmetric, codes)
            else:
                scale, offset, found = _search(values, count, bits, symmetric, shrinks, codes)
            if bias_weight > 1:
                scale, offset, found = _stretched(values, codes, count, bits, symmetric, bias_weight, scale, offset)
            scales[row * groups + group] = scale
            offsets[row * groups + group] = offset
            error += found
            pack_group(codes, eights, count, bits, packed, row * row_bytes + begin * bits // 8, (row + 1) * row_bytes)
    largest[0] = lane_maximum(extent) + lane_sum(spoiled)
    return error


def of_group(values, codes, count, bits, symmetric, begin, place, more, *settings):
    """Write the codes of `count` values and return scale, offset and Σ(w − ŵ)²: what a quantizer does for each group.

    values: float32, codes: uint8, both with room for whole lanes, where values are 0. begin: the group's first column;
    place: its number among all groups. more: arrays to fill beside codes, scales and offsets. settings: the quantizer's
    own.
    """
    raise NotImplementedError


def rows_kernel(own):
    """The kernel `_rows` for groups that `own` quantizes, a kernel with the arguments of `of_group`."""
    return kernel_over(_rows, of_group=own)


def _rows(weight, columns, bits, group_size, symmetric, settings, largest, packed, scales, offsets, *more):
    """Quantize whole rows of a flat matrix, group by group; returns Σ(w − ŵ)² in float64.

    weight: float32, float16 or bfloat16 bits. settings, more: see `of_group`. largest: float32, the first becomes
    max |w|, or NaN if a weight is NaN or infinite. packed: uint8 [rows · bytes per row], zeroed. scales, offsets:
    float32 [rows · groups], as stored.
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
            begin, place = group * group_size, row * groups + group
            count = min(group_size, columns - begin)
            extent, spoiled = _read(weight, row * columns + begin, count, values, extent, spoiled)
            scale, offset, found = of_group(values, codes, count, bits, symmetric, begin, place, more, *settings)
            scales[place] = scale
            offsets[place] = offset
            error += found
            pack_group(codes, eights, count, bits, packed, row * row_bytes + begin * bits // 8, (row + 1) * row_bytes)
    largest[0] = lane_maximum(extent) + lane_sum(spoiled)
    return error


@kernel
def _read(weight, source, count, values, extent, spoiled):
    """Copy one group to `values`, zeros up to whole lanes behind it; returns the two that follow, brought up to date.

    extent: max |w| by lane. spoiled: 0, or NaN in lanes that saw NaN or infinity.
    """
    whole = count // LANES * LANES
    for at in range(0, whole, LANES):
        store(values, at, load(weight, source + at))
    if whole < count:
        store(values, whole, load_some(weight[: source + count], source + whole))
    for at in range(0, count, LANES):
        value = load(values, at)
        extent = maximum(extent, magnitude(value))
        spoiled = fma(value, splat(np.float32(0)), spoiled)
    return extent, spoiled


@kernel
def _range(values, count):
    """The smallest and the largest weight of a group and 0, and the smallest size of those that are not 0."""
    none, far = splat(np.float32(0)), splat(np.float32(np.inf))
    low, high, least = none, none, far
    for at in range(0, count, LANES):
        value = load(values, at)
        low = minimum(low, value)
        high = maximum(high, value)
        size = magnitude(value)
        least = minimum(least, where_less(none, size, size, far))
    return lane_minimum(low), lane_maximum(high), lane_minimum(least)


@kernel
def _search(values, count, bits, symmetric, shrinks, codes):
    """Best step of one group: scale, zero point and squared error; codes become q."""
    top = np.float32(2**bits - 1)
    lowest, highest, smallest = _range(values, count)
    if symmetric:
        zero = np.float32(2 ** (bits - 1))
        widest = max(highest, -lowest) / (top - zero)
    else:
        widest = (highest - lowest) / top
        zero = min(top, np.float32(np.rint(-lowest / widest))) if widest > 0 else np.float32(0)
    step = as_half(widest)
    if shrinks.size > 0:
        step, least = _best_step(values, count, widest, zero, top, shrinks)
        fitted = _least_squares(values, count, step, -zero, top - zero)
        error = _encode(values, count, fitted, zero, top, codes)
        if error < least:
            step = fitted
        else:
            error = _encode(values, count, step, zero, top, codes)
    else:
        error = _encode(values, count, step, zero, top, codes)
    common = _common_step(values, count, smallest, highest - lowest, top)
    if common > 0 and error > 0:
        exact = _encode(values, count, common, zero, top, codes)
        if exact < error:
            return common, zero, np.float64(exact)
        _encode(values, count, step, zero, top, codes)
    return step, zero, np.float64(error)


@kernel
def _best_step(values, count, widest, zero, top, shrinks):
    """The step of least Σ(w − ŵ)² among fractions of the widest, and that error."""
    none = splat(np.float32(0))
    candidates = as_half(splat(widest) * load(shrinks, 0))
    inverses = where_less(none, candidates, splat(np.float32(1)) / candidates, none)
    errors = _errors(values, count, candidates, inverses, splat(-zero), splat(top - zero))
    least = lane_minimum(errors)
    return lane_maximum(where_less(splat(least), errors, none, candidates)), least


@kernel
def _common_step(values, count, smallest, span, top):
    """The largest float16 step of which all weights are whole multiples, at most `top` of them; 0 if there is none.

    A group that was quantized before has one, though its outer codes may be unused. It is a fraction 1/k of the
    smallest size. If all weights that are not 0 are one value, that value counts even if float16 rounds it.
    """
    if not smallest < np.inf:  # zeros alone
        return np.float32(0)
    divisor = np.float32(1)
    while divisor * span <= top * smallest:
        step = as_half(smallest / divisor)
        if step * divisor == smallest and _is_on_grid(values, count, step):
            return step
        divisor += np.float32(1)
    return as_half(smallest) if smallest == span else np.float32(0)


@kernel
def _is_on_grid(values, count, step):
    """Whether all weights are whole multiples of a step."""
    scale, inverse = splat(step), splat(np.float32(1) / step)
    for at in range(0, count, LANES):
        value = load(values, at)
        if lane_maximum(magnitude(value - nearest(value * inverse) * scale)) > 0:
            return False
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
def _stretched(values, codes, count, bits, symmetric, bias_weight, scale, offset):
    """Fit a group's grid to its codes with `_least_biased`: scale, offset and Σ(w − ŵ)²."""
    if bits == 1:
        return _stretched_two(values, codes, count, symmetric, bias_weight, scale, offset)
    shift, none = splat(offset), splat(np.float32(0))
    product, square, energy = none, none, none
    for at in range(0, count, LANES):
        value, level = load(values, at), load_bytes(codes, at) - shift
        product = fma(value, level, product)
        square = fma(level, level, square)
        energy = fma(value, value, energy)
    size = lane_sum(energy)
    fitted = as_half(_least_biased(lane_sum(product), lane_sum(square), size, size, bias_weight))
    if fitted > 0:
        scale = fitted
    step, error = splat(scale), none
    for at in range(0, count, LANES):
        miss = (load_bytes(codes, at) - shift) * step - load(values, at)
        error = fma(miss, miss, error)
    return scale, offset, np.float64(lane_sum(error))


@kernel
def _stretched_two(values, codes, count, symmetric, bias_weight, scale, offset):
    """`_stretched` for two levels offset ± scale, about the mean of the weights, which they keep."""
    total, size, balance = 0.0, 0.0, 0.0
    for at in range(count):
        value = np.float64(values[at])
        total += value
        size += value * value
        balance += 2.0 * codes[at] - 1.0
    mean, lean = (0.0, 0.0) if symmetric else (total / count, balance / count)
    product, square, energy = 0.0, 0.0, 0.0
    for at in range(count):
        value, level = values[at] - mean, 2.0 * codes[at] - 1.0 - lean
        product += value * level
        square += level * level
        energy += value * value
    fitted = _least_biased(product, square, energy, size, bias_weight)
    if as_half(np.float32(fitted)) > 0:
        scale, offset = as_half(np.float32(fitted)), as_half(np.float32(mean - fitted * lean))
    error = 0.0
    for at in range(count):
        miss = (2.0 * codes[at] - 1.0) * scale + offset - values[at]
        error += miss * miss
    return scale, offset, error


@kernel
def _least_biased(product, square, energy, size, bias_weight):
    """The scale s of levels l with the least |e|² + (bias_weight − 1)·(e·w)²/|w|², e = s·l − w; 0 if there is none.

    product, square, energy: w·l, |l|² and |w|², of deviations from means where those are kept. size: Σw² of the weights
    themselves; the largest ones, whose stretched levels might be too much for fp16, are left alone.
    """
    along = (bias_weight - 1) * product * product + square * energy
    if product > 0 and square > 0 and along > 0 and size < STRETCHED_SIZE:
        return bias_weight * product * energy / along
    return product * 0


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
    return scale, offset, _encode_two(values, count, scale, offset, split, codes)


@kernel
def _encode_two(values, count, scale, offset, split, codes):
    """Write code 1 for what is above `split`, for offset + scale, else 0, for offset − scale; returns Σ(w − ŵ)²."""
    error = 0.0
    for at in range(count):
        codes[at] = values[at] > split
        level = np.float32(codes[at])
        miss = (np.float32(2) * level - np.float32(1)) * scale + offset - values[at]
        error += miss * miss
    return error


@kernel
def refit_rows(weight, columns, bits, group_size, symmetric, rounded, brain, bias_weight, packed, scales, offsets):
    """Quantize rows again on the grids that 16-bit scales allow, from free ones; returns Σ(w − ŵ)² in float64.

    weight: as for `quantize_rows`. symmetric: ŵ = s·(q − 2^(b−1)); else ŵ = s·q + β with a free β. rounded: ŵ itself
    has 16 bits. brain: 16 bits are bfloat16's, else float16's. bias_weight: as for `quantize_rows`, of the last fit.
    packed: uint8 [rows · bytes per row]. scales, offsets: float32 [rows · groups], scales and zero points, which become
    the scales and β of 16 bits.
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
            if least > 0 and bias_weight > 1:
                better, start = _stretched_affine(values, codes, count, brain, bias_weight, scale, offset)
                found = _error_affine(values, codes, count, better, start, zero, rounded, brain)
                if found <= MOST_STRETCHED * least:  # else 16 bits cannot hold the fit
                    scale, offset, least = better, start, found
            scales[place] = scale
            offsets[place] = offset
            error += least
            pack_group(codes, eights, count, bits, packed, row * row_bytes + begin * bits // 8, (row + 1) * row_bytes)
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
def _error_affine(values, codes, count, scale, offset, zero, rounded, brain):
    """Σ(w − ŵ)² of given codes on a grid scale·(q − zero) + offset."""
    step, start, shift = splat(scale), splat(offset), splat(zero)
    error = splat(np.float32(0))
    for at in range(0, count, LANES):
        restored = (load_bytes(codes, at) - shift) * step + start
        if rounded:
            restored = _narrow(restored, brain)
        miss = restored - load(values, at)
        error = fma(miss, miss, error)
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


@kernel
def _stretched_affine(values, codes, count, brain, bias_weight, scale, offset):
    """`_stretched` for a grid scale·q + offset in 16 bits, about the mean of the weights, which it keeps."""
    none = splat(np.float32(0))
    total, sum_ = none, none
    for at in range(0, count, LANES):
        total = total + load(values, at)
        sum_ = sum_ + load_bytes(codes, at)
    mean, middle = lane_sum(total) / np.float32(count), lane_sum(sum_) / np.float32(count)
    origin, center = splat(mean), splat(middle)
    product, square, energy, size = none, none, none, none
    for at in range(0, count, LANES):
        value, level = load(values, at) - origin, load_bytes(codes, at) - center
        product = fma(value, level, product)
        square = fma(level, level, square)
        energy = fma(value, value, energy)
        size = fma(load(values, at), load(values, at), size)
    fitted = _least_biased(lane_sum(product), lane_sum(square), lane_sum(energy), lane_sum(size), bias_weight)
    better = _narrow(np.float32(fitted), brain)
    return (better, _narrow(mean - better * middle, brain)) if better > 0 else (scale, offset)
