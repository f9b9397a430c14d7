"""Multiply with integer codes on the CPU: unpacked in registers, 64 at a time, and multiplied as whole numbers."""

from __future__ import annotations

import numpy as np

from alphaq.runtime.block_kernels import HEADER, TASK_ROWS, last_codes, read_grids
from alphaq.simd.codes import (
    CODES,
    add_products,
    as_floats,
    codes_at,
    fetch,
    no_products,
    shifted_sum,
    two_halves,
    unpack,
)
from alphaq.simd.vectors import LANES, fma, kernel, lane_sum, load, load_bytes, splat, store

AHEAD = 2048  # bytes: processors foresee a stream of codes only to the end of its page


@kernel
def multiply_block(block, first, mine, planes, digits, steps, sums, out, column, pairs, room):
    """Products of up to 64 rows of a block, from `first` on, with some tokens.

    mine: int64 [count], rows of digits [planes, tokens, padded], steps and sums. out: float32 [pairs, width]; products
    of mine[i] go to row pairs[i], from `column` on. room: see `room_of`.
    """
    address, bits, group_size, symmetric, rows, columns = block
    scales, means, weights, totals, zeros, rest = room
    tokens, count = mine.size, min(TASK_ROWS, rows - first)
    groups = -(-columns // group_size)
    level = 0 if group_size == 32 else 1 if group_size == 64 else 2
    row_bytes = 4 * -(-columns * bits // 32)
    read_grids(block, first, count, scales, means, zeros)
    padded_groups = -(-groups // LANES) * LANES
    halves = np.float32(0.5) if symmetric > 1 else np.float32(0)
    middle = splat(np.float32(2 ** (bits - 1)) - halves if bits > 1 else np.float32(1))
    factor = splat(np.float32(2) if bits == 1 else np.float32(1))
    padded = digits.shape[2]
    stride = digits.shape[1] * padded
    digits_at = digits.ctypes.data
    none = splat(np.float32(0))
    if tokens == 1:  # nothing but a row's weights leaves the registers
        at, target = digits_at + mine[0] * padded, out[pairs[0]]
        known, step, whole = sums[level, mine[0]], steps[level, mine[0]], columns // CODES
        grid = bits, symmetric, scales, middle, means, zeros, factor, known, step, groups
        source = address + HEADER + first * row_bytes
        if columns % CODES == 0:  # a loop without row's ends, which takes half as long
            for row in range(count):
                total = _start(row, grid, weights)
                total = _add_chunks(source, whole, bits, level, planes, stride, at, weights, total)
                target[column + first + row] = lane_sum(total)
                source += row_bytes
            return
        for row in range(count):
            total = _start(row, grid, weights)
            last = last_codes(source, columns, bits, rest)
            total = _one_token(source, last, columns, bits, level, planes, stride, at, weights, total)
            target[column + first + row] = lane_sum(total)
            source += row_bytes
        return
    for row in range(count):
        for token in range(tokens):
            store(totals, LANES * token, none)
        for group in range(0, groups, LANES):
            scale = load(scales, row * groups + group)
            base = _base(bits, symmetric, scale, middle, means, row * groups + group, zeros, row, group)
            scale = scale * factor
            for token in range(tokens):
                known = sums[level, mine[token]]
                store(totals, LANES * token, fma(base, load(known, group), load(totals, LANES * token)))
                store(weights, token * padded_groups + group, scale * load(steps[level, mine[token]], group))
        source = address + HEADER + (first + row) * row_bytes
        last = last_codes(source, columns, bits, rest)
        token = 0
        while token < tokens:
            place = token * padded_groups
            if token + 2 >= tokens:
                at = digits_at + mine[token] * padded
                total = load(totals, LANES * token)
                total = _one_token(source, last, columns, bits, level, planes, stride, at, weights[place:], total)
                out[pairs[token], column + first + row] = lane_sum(total)
                token += 1
                continue
            second, third, fourth = token + 1, token + 2, min(token + 3, tokens - 1)
            products = _four_tokens(
                source,
                last,
                columns,
                bits,
                level,
                planes,
                stride,
                digits_at + mine[token] * padded,
                digits_at + mine[second] * padded,
                digits_at + mine[third] * padded,
                digits_at + mine[fourth] * padded,
                weights,
                place,
                second * padded_groups,
                third * padded_groups,
                fourth * padded_groups,
            )
            out[pairs[token], column + first + row] = lane_sum(products[0] + load(totals, LANES * token))
            out[pairs[second], column + first + row] = lane_sum(products[1] + load(totals, LANES * second))
            out[pairs[third], column + first + row] = lane_sum(products[2] + load(totals, LANES * third))
            out[pairs[fourth], column + first + row] = lane_sum(products[3] + load(totals, LANES * fourth))
            token += 4


@kernel
def _base(bits, symmetric, scale, middle, means, at, zeros, row, group):
    """What a code of 0 stands for, of sixteen groups of a row."""
    none = splat(np.float32(0))
    if bits == 1:
        return load(means, at) - scale if not symmetric else none - scale
    if symmetric:
        return none - scale * middle
    return none - scale * load_bytes(zeros, group * CODES + LANES * row)


@kernel
def _start(row, grid, weights):
    """What a row's products with one token are without its codes, of which each group's worth goes to weights."""
    bits, symmetric, scales, middle, means, zeros, factor, known, step, groups = grid
    total = splat(np.float32(0))
    for group in range(0, groups, LANES):
        scale = load(scales, row * groups + group)
        base = _base(bits, symmetric, scale, middle, means, row * groups + group, zeros, row, group)
        total = fma(base, load(known, group), total)
        store(weights, group, scale * factor * load(step, group))
    return total


@kernel
def _one_token(source, last, columns, bits, level, planes, stride, at, weights, total):
    """Add the products of a row's codes with one token's digits at an address, weighted by group."""
    whole = columns // CODES
    total = _add_chunks(source, whole, bits, level, planes, stride, at, weights, total)
    if columns % CODES:
        product = _products(unpack(last, bits), at + CODES * whole, planes, stride)
        total = fma(product, _weight(weights, 0, whole, level), total)
    return total


@kernel
def _add_chunks(source, whole, bits, level, planes, stride, at, weights, total):
    """`_one_token` for a row's whole chunks."""
    chunk = 0
    if level == 2:
        while chunk + 2 <= whole:
            place = source + 8 * bits * chunk
            fetch(place + AHEAD)
            one, two = unpack(place, bits), unpack(place + 8 * bits, bits)
            total = fma(products_of_two(one, two, at, planes, stride), splat(weights[chunk >> 1]), total)
            at += 2 * CODES
            chunk += 2
    while chunk < whole:
        place = source + 8 * bits * chunk
        fetch(place + AHEAD)
        total = fma(_products(unpack(place, bits), at, planes, stride), _weight(weights, 0, chunk, level), total)
        at += CODES
        chunk += 1
    return total


@kernel
def _four_tokens(
    source, last, columns, bits, level, planes, stride, at0, at1, at2, at3, weights, place0, place1, place2, place3
):
    """`_one_token` for four of them, unpacking once."""
    whole, chunk, more = columns // CODES, 0, 0
    total0 = total1 = total2 = total3 = splat(np.float32(0))
    if level == 2:
        while chunk + 2 <= whole:
            one = unpack(source + 8 * bits * chunk, bits)
            two = unpack(source + 8 * bits * (chunk + 1), bits)
            group = chunk >> 1
            total0 = fma(products_of_two(one, two, at0 + more, planes, stride), splat(weights[place0 + group]), total0)
            total1 = fma(products_of_two(one, two, at1 + more, planes, stride), splat(weights[place1 + group]), total1)
            total2 = fma(products_of_two(one, two, at2 + more, planes, stride), splat(weights[place2 + group]), total2)
            total3 = fma(products_of_two(one, two, at3 + more, planes, stride), splat(weights[place3 + group]), total3)
            more += 2 * CODES
            chunk += 2
    while chunk * CODES < columns:
        one = unpack(source + 8 * bits * chunk if chunk < whole else last, bits)
        total0 = fma(_products(one, at0 + more, planes, stride), _weight(weights, place0, chunk, level), total0)
        total1 = fma(_products(one, at1 + more, planes, stride), _weight(weights, place1, chunk, level), total1)
        total2 = fma(_products(one, at2 + more, planes, stride), _weight(weights, place2, chunk, level), total2)
        total3 = fma(_products(one, at3 + more, planes, stride), _weight(weights, place3, chunk, level), total3)
        more += CODES
        chunk += 1
    return total0, total1, total2, total3


@kernel
def _weight(weights, place, chunk, level):
    """What the sixteen sums of a chunk are worth."""
    if level == 0:
        return two_halves(weights[place + 2 * chunk], weights[place + 2 * chunk + 1])
    return splat(weights[place + (chunk if level == 1 else chunk >> 1)])


@kernel
def _products(one, at, planes, stride):
    """Sixteen sums of four products each, of 64 codes with the digits at an address."""
    low = at + (planes - 2) * stride
    high = add_products(no_products(), one, codes_at(low))
    product = as_floats(shifted_sum(high, add_products(no_products(), one, codes_at(low + stride))))
    if planes == 3:
        highest = add_products(no_products(), one, codes_at(at))
        product = fma(as_floats(highest), splat(np.float32(65536)), product)
    return product


@kernel
def products_of_two(one, two, at, planes, stride):
    """Sixteen sums of eight products each, of 128 codes with digits at an address, whose planes are a stride apart."""
    low = at + (planes - 2) * stride
    product = as_floats(shifted_sum(_plane(one, two, low), _plane(one, two, low + stride)))
    if planes == 3:
        product = fma(as_floats(_plane(one, two, at)), splat(np.float32(65536)), product)
    return product


@kernel
def _plane(one, two, at):
    return add_products(add_products(no_products(), one, codes_at(at)), two, codes_at(at + CODES))
