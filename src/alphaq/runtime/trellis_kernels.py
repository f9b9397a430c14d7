"""Multiply with trellis codes on the CPU: weights are decoded in registers, as whole numbers, and never written out.

Inputs are those of `kernels`, whole numbers n with a step σ for 128 neighbours. With ŵ = s·(v − middle) for a row

    Σ ŵ·x  ≈  s·(Σ over steps of  σ·(Σ v·n)  −  middle·Σ σ·(Σ n))

where the sums of a step are exact. All tokens of a task share the decoding.
"""

from __future__ import annotations

import numpy as np

from alphaq.formats.trellis import UNIT
from alphaq.runtime.block_kernels import HEADER, TASK_ROWS, read_scales
from alphaq.runtime.input_kernels import STEP_GROUP
from alphaq.runtime.integer_kernels import AHEAD, products_of_two
from alphaq.runtime.state_kernels import BEFORE, FRESH, MIDDLE, weights_at
from alphaq.simd.codes import CODES, byte_at, fetch, put_brains, put_byte, put_codes, put_floats
from alphaq.simd.vectors import LANES, as_brain, fma, kernel, lane_sum, load, load_bytes, splat, store


@kernel
def end_of_row(source, columns, rate, rest):
    """Where the last weights of a row can be read as if there were 64 of them."""
    if columns % CODES == 0:
        return source - BEFORE
    begin, end = 2 * rate * (columns // CODES) - BEFORE, row_bytes_of(columns, rate)
    for at in range(begin, end):
        rest[at - begin] = byte_at(source + at) if at >= 0 else 0
    return rest.ctypes.data


@kernel
def row_bytes_of(columns, rate):
    return 4 * -(-(columns * rate // 4) // 32)


@kernel
def multiply_trellis(block, first, mine, planes, digits, steps, sums, out, column, pairs, room):
    """`integer_kernels.multiply_block` for trellis codes, whose bits are a rate in quarters."""
    address, rate, _, _, rows, columns = block
    scales, totals, rest, tokens = room[0], room[3], room[5], mine.size
    count, row_bytes = min(TASK_ROWS, rows - first), row_bytes_of(columns, rate)
    read_scales(address + HEADER + rows * row_bytes + 2 * first, count, scales)
    begins = np.zeros(tokens, np.float32)
    for token in range(tokens):
        known = np.float64(0)
        for step in range(-(-columns // STEP_GROUP)):
            known += sums[2, mine[token], step]
        begins[token] = -MIDDLE * known
    at, stride = digits.ctypes.data + mine[0] * digits.shape[2], digits.shape[1] * digits.shape[2]
    weights, target = steps[2, mine[0]], out[pairs[0]]
    if tokens == 1 and columns % STEP_GROUP == 0:  # a loop without row's ends, which takes half as long
        for row in range(count):
            source = address + HEADER + (first + row) * row_bytes
            total = lane_sum(_whole_steps(source, rate, columns // STEP_GROUP, planes, at, stride, weights)) + begins[0]
            target[column + first + row] = total * (scales[row] * np.float32(UNIT))
        return
    for row in range(count):
        source = address + HEADER + (first + row) * row_bytes
        last = end_of_row(source, columns, rate, rest)
        for token in range(tokens):
            store(totals, LANES * token, splat(np.float32(0)))
        begin = columns // STEP_GROUP if tokens == 1 else 0
        if begin:
            store(totals, 0, _whole_steps(source, rate, begin, planes, at, stride, weights))
        _add_steps(source, last, rate, columns, begin, planes, digits, steps, mine, totals)
        for token in range(tokens):
            total = lane_sum(load(totals, LANES * token)) + begins[token]
            out[pairs[token], column + first + row] = total * (scales[row] * np.float32(UNIT))


@kernel
def _whole_steps(source, rate, count, planes, at, stride, steps):
    """Σ σ·(Σ v·n) of a row's first steps for one token, whose digits are at an address: sixteen parts."""
    total, begin, mask = splat(np.float32(0)), source - BEFORE, FRESH
    for step in range(count):
        fetch(begin + AHEAD)
        one, two = weights_at(begin, rate, mask), weights_at(begin + 2 * rate, rate, -1)
        total = fma(products_of_two(one, two, at, planes, stride), splat(steps[step]), total)
        begin += 4 * rate
        at += STEP_GROUP
        mask = -1
    return total


@kernel
def _add_steps(source, last, rate, columns, start, planes, digits, steps, mine, totals):
    """Add Σ σ·(Σ v·n) of a row from some step on to the totals of all tokens, sixteen parts each."""
    whole, length = columns // CODES, digits.shape[2]
    stride = digits.shape[1] * length
    for step in range(start, -(-columns // STEP_GROUP)):
        begin = source - BEFORE + step * 4 * rate
        fetch(begin + AHEAD)
        one = weights_at(begin if 2 * step < whole else last, rate, -1 if step else FRESH)
        # Beyond the row inputs are 0, and any weights will do.
        two = weights_at(begin + 2 * rate if 2 * step + 1 < whole else last, rate, -1)
        for token in range(mine.size):
            at = digits.ctypes.data + mine[token] * length + STEP_GROUP * step
            product, weight = products_of_two(one, two, at, planes, stride), splat(steps[2, mine[token], step])
            store(totals, LANES * token, fma(product, weight, load(totals, LANES * token)))


@kernel
def restore_trellis(block, first, brain, out, room):
    """`block_kernels.restore_block` for trellis codes."""
    address, rate, _, _, rows, columns = block
    scales, rest = room[0], room[5]
    count, row_bytes = min(TASK_ROWS, rows - first), row_bytes_of(columns, rate)
    read_scales(address + HEADER + rows * row_bytes + 2 * first, count, scales)
    codes, middle, whole = rest[CODES:], splat(np.float32(MIDDLE)), columns // CODES
    width = 2 if brain else 4
    values = np.empty(LANES, np.float32)
    raw = values.view(np.uint8)
    for row in range(count):
        source = address + HEADER + (first + row) * row_bytes
        last = end_of_row(source, columns, rate, rest)
        scale = splat(scales[row] * np.float32(UNIT))
        for begin in range(0, columns, LANES):
            if begin % CODES == 0:
                chunk = begin // CODES
                place = source - BEFORE + 2 * chunk * rate if chunk < whole else last
                put_codes(codes.ctypes.data, weights_at(place, rate, -1 if chunk else FRESH))
            value = (load_bytes(codes, begin % CODES) - middle) * scale
            if brain:
                value = as_brain(value)
            target = out + width * (row * columns + begin)
            if begin + LANES > columns:
                store(values, 0, value)
                for lane in range(columns - begin):
                    for byte in range(width):
                        put_byte(target + width * lane + byte, raw[4 * lane + 4 - width + byte])
            elif brain:
                put_brains(target, value)
            else:
                put_floats(target, value)
