"""Run the operations of one token's step through a model, as a list in memory, without anything between them.

A step is an array of rows, one an operation: its number, its extents, up to four tensors by address, type and strides,
and whole numbers of its own. Every operation computes with float64, or sums in it, and rounds as torch does: to
float32, then to the type of its result. Tensors are small, so what counts is that no row takes long to begin.

An operation that is not for this interpreter, or not now (equal candidates of a top-k, long attention), stops it: the
caller runs it and goes on behind.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from alphaq.runtime.kernels import WORTH_THREADS, multiply
from alphaq.runtime.lane_kernels import lanes_at, put_lanes
from alphaq.runtime.line_kernels import exponents, largest, plain, read_line, softmax, sums, write_line
from alphaq.runtime.lone_kernels import all_differ, desk_at, desk_bytes, lay_out, multiply_lone
from alphaq.runtime.restored_kernels import LINE
from alphaq.runtime.row_kernels import (
    ADDRESS,
    APPEND,
    ATTEND,
    DENSE,
    EMBED,
    EXTENTS,
    FIRST_PLAIN,
    FLOAT32,
    LONG,
    MANY,
    MEAN,
    OP,
    OWN,
    PACKED,
    PREPARED,
    SOFTMAX,
    SUM,
    TENSOR,
    TENSORS,
    TOP,
    item_bytes,
    kind_of,
    line_of,
    stride_of,
)
from alphaq.simd.codes import pointer
from alphaq.simd.vectors import LANES, fma, kernel, lane_sum, load, splat, store


@kernel
def _embed(row, left):
    """A line of a table by the number at an address; returns whether there is none."""
    number = carray(pointer(row[OWN]), (1,), np.int64)[0]
    if number < 0 or number >= row[OWN + 1]:
        return True
    kind = kind_of(row, 1)
    source = row[TENSORS + TENSOR + ADDRESS] + number * row[OWN + 2] * item_bytes(kind)
    read_line(source, kind, stride_of(row, 1), row[EXTENTS + 3], left)
    write_line(left, row[EXTENTS + 3], row[TENSORS + ADDRESS], kind_of(row, 0), stride_of(row, 0))
    return False


@kernel
def _packed(row, sample, desk, products, known, left, right, parallel, function, threads):
    """Products with packed matrices, a bias added; returns whether some are left to do.

    products: room for float32 results. known: int64 [2], where the inputs on the desk are from and bytes of each.
    """
    tokens, columns, rows, pairs = row[OWN], row[OWN + 1], row[OWN + 5], row[OWN + 8]
    address, width = row[TENSORS + TENSOR + ADDRESS], row[OWN + 3] * row[OWN + 5]
    inputs = carray(pointer(address), (tokens * columns,), sample.dtype)
    codings = carray(pointer(row[OWN + 2]), (row[OWN + 3], row[OWN + 4], 4), np.int64)
    experts = carray(pointer(row[OWN + 6]), (pairs,), np.int64)
    chosen = carray(pointer(row[OWN + 7]), (pairs,), np.int64)
    out = carray(pointer(products.ctypes.data), (pairs, width), np.float32)
    exact = kind_of(row, 1) == FLOAT32
    if not row[PREPARED]:
        known[0] = 0
    if (threads < 2 or pairs * width * columns < WORTH_THREADS) and all_differ(experts):
        if known[0] != address:
            known[0], known[1] = address, lay_out(desk, inputs, tokens, columns, exact)
        multiply_lone(desk, known[1], tokens, columns, codings, rows, experts, chosen, out)
    elif multiply(inputs, columns, codings, rows, experts, chosen, MANY, MANY, exact, out, parallel, function, threads):
        return True
    for pair in range(pairs):
        _put_products(row, products, pair, width, left, right)
    return False


@kernel
def _put_products(row, products, pair, width, left, right):
    """Products of a pair where they belong, a bias added."""
    kind, begin = kind_of(row, 0), pair * width
    target, bias = row[TENSORS + ADDRESS] + begin * item_bytes(kind), row[TENSORS + 3 * TENSOR + ADDRESS]
    whole = width // LANES * LANES
    for at in range(0, whole, LANES):
        value = load(products, begin + at)
        if bias:
            value = value + lanes_at(bias + at * item_bytes(kind), kind)
        put_lanes(target + at * item_bytes(kind), kind, value)
    count, more = width - whole, whole * item_bytes(kind)
    if count:
        for at in range(count):
            left[at] = products[begin + whole + at]
        if bias:
            read_line(bias + more, kind, 1, count, right)
            for at in range(count):
                left[at] += right[at]
        write_line(left, count, target + more, kind, 1)


@kernel
def _dot(address, kind, values, count):
    """Sum of products of numbers at an address with float32 values, whose number is a multiple of 16."""
    total = splat(np.float32(0))
    step = LANES * item_bytes(kind)
    for at in range(0, count, LANES):
        total = fma(lanes_at(address, kind), load(values, at), total)
        address += step
    return lane_sum(total)


@kernel
def _narrow(address, kind, count, wide):
    """Numbers at an address as float32."""
    read_line(address, kind, 1, count, wide)
    values = np.empty(count, np.float32)
    for at in range(count):
        values[at] = wide[at]
    return values


@kernel
def _dense(row, left, right):
    """Products with a plain matrix of float32."""
    rows, columns = row[OWN], row[OWN + 1]
    weight, bias = row[TENSORS + 2 * TENSOR + ADDRESS], row[TENSORS + 3 * TENSOR + ADDRESS]
    for token in range(row[OWN + 2]):
        values = _narrow(row[TENSORS + TENSOR + ADDRESS] + 4 * token * columns, FLOAT32, columns, right)
        for begin in range(0, rows, left.size):
            count = min(left.size, rows - begin)
            for at in range(count):
                left[at] = _dot(weight + 4 * (begin + at) * columns, FLOAT32, values, columns)
            if bias:
                read_line(bias + 4 * begin, FLOAT32, 1, count, right)
                for at in range(count):
                    left[at] += right[at]
            write_line(left, count, row[TENSORS + ADDRESS] + 4 * (token * rows + begin), FLOAT32, 1)


@kernel
def _append(row, slots, length, left):
    """A token's keys or values behind those that a cache has; a slot holds where it is and how many have room."""
    heads, width, kind = row[EXTENTS + 2], row[EXTENTS + 3], kind_of(row, 1)
    address, capacity = slots[row[OWN], 0], slots[row[OWN], 1]
    for head in range(heads):
        read_line(line_of(row, 1, 0, 0, head), kind, stride_of(row, 1), width, left)
        write_line(left, width, address + (head * capacity + length) * width * item_bytes(kind), kind, 1)


@kernel
def _attend(row, slots, length, scale, left, right):
    """Attention of every query to all keys up to its own; returns whether torch is to do it."""
    query_heads, queries, width, value_width = row[OWN + 2], row[OWN + 3], row[OWN + 4], row[OWN + 5]
    kind, item = kind_of(row, 1), item_bytes(kind_of(row, 1))
    heads, known = row[OWN + 6], length + 1
    if query_heads * queries * known * (width + value_width) > LONG:
        return True
    keys, key_room = slots[row[OWN], 0], slots[row[OWN], 1]
    entries, value_room = slots[row[OWN + 1], 0], slots[row[OWN + 1], 1]
    scores, values = np.empty(known, np.float64), carray(pointer(right.ctypes.data), (width,), np.float32)
    for number in range(query_heads * queries):
        head, query = number // queries, number % queries
        read_line(line_of(row, 1, 0, head, query), kind, stride_of(row, 1), width, left)
        for at in range(width):
            values[at] = left[at]
        source = head * heads // query_heads
        place = keys + source * key_room * width * item
        for token in range(known):
            scores[token] = scale * _dot(place, kind, values, width)
            place += width * item
        exponents(scores, known)
        _mix(entries + source * value_room * value_width * item, kind, value_width, scores, known, left)
        write_line(left, value_width, line_of(row, 0, 0, head, query), kind_of(row, 0), stride_of(row, 0))
    return False


@kernel
def _mix(address, kind, width, shares, count, result):
    """Σ shares[i] · lines[i] of so many lines at an address, whose width is a multiple of 16; sixty-four at a time."""
    step, none = LANES * item_bytes(kind), splat(np.float32(0))
    for begin in range(0, width, 4 * LANES):
        parts = min(4, (width - begin) // LANES)
        one, two, three, four = none, none, none, none
        place = address + begin * item_bytes(kind)
        for token in range(count):
            share = splat(np.float32(shares[token]))
            one = fma(lanes_at(place, kind), share, one)
            if parts > 1:
                two = fma(lanes_at(place + step, kind), share, two)
            if parts > 2:
                three = fma(lanes_at(place + 2 * step, kind), share, three)
            if parts > 3:
                four = fma(lanes_at(place + 3 * step, kind), share, four)
            place += width * item_bytes(kind)
        sums = np.empty(4 * LANES, np.float32)
        store(sums, 0, one)
        store(sums, LANES, two)
        store(sums, 2 * LANES, three)
        store(sums, 3 * LANES, four)
        for at in range(LANES * parts):
            result[begin + at] = sums[at]


@kernel
def memory_bytes(room):
    """Bytes that `run` works in."""
    line, columns, tokens, results = room
    return 24 * line + 4 * results + desk_bytes(columns, tokens) + 4 * LINE


@kernel
def run(rows, numbers, slots, length, begin, room, memory, sample, parallel, function, threads):
    """Run a step's rows from `begin` on; returns the first that is not for here, or how many there are.

    rows: int64 [n, ROW]. numbers: float64 [n, 4]. slots: int64 [n, 2], where keys and values of `length` tokens are
    and how many have room. room: the longest line, columns and tokens of packed products, and how many these are.
    memory: uint8 [`memory_bytes`], zeros before the first step. sample: empty, of the type of packed products' inputs.
    parallel, function, threads: see `kernels.multiply`.
    """
    line, columns, tokens, results = room
    place = memory.ctypes.data + -memory.ctypes.data % LINE
    # Arrays are counted wherever they are passed on, unless they are made of addresses.
    every, every_number = (
        carray(pointer(rows.ctypes.data), rows.shape, np.int64),
        carray(pointer(numbers.ctypes.data), numbers.shape, np.float64),
    )
    left, right, other = (
        carray(pointer(place), (line,), np.float64),
        carray(pointer(place + 8 * line), (line,), np.float64),
        carray(pointer(place + 16 * line), (line,), np.float64),
    )
    place += 24 * line
    known, products = carray(pointer(place), (2,), np.int64), carray(pointer(place + LINE), (results,), np.float32)
    place += LINE + 4 * results
    desk = desk_at(place + -place % LINE, columns, tokens)
    known[0] = 0
    for number in range(begin, len(rows)):
        row, given = every[number], every_number[number]
        op, stop = row[OP], False
        if op >= FIRST_PLAIN:
            plain(row, given, left, right, other)
        elif op == PACKED:
            stop = _packed(row, sample, desk, products, known, left, right, parallel, function, threads)
        elif op in (SUM, MEAN):
            sums(row, left, right)
        elif op == APPEND:
            _append(row, slots, length, left)
        elif op == ATTEND:
            stop = _attend(row, slots, length, given[0], left, right)
        elif op == SOFTMAX:
            softmax(row, left)
        elif op == TOP:
            stop = largest(row, left, right)
        elif op == DENSE:
            _dense(row, left, right)
        elif op == EMBED:
            stop = _embed(row, left)
        else:
            stop = True
        if stop:
            return number
    return len(rows)
