"""Run the operations of one token's step through a model, as a list in memory, without anything between them.

A step is an array of rows, one an operation: its number, its extents, up to four tensors by address, type and strides,
and whole numbers of its own. Every operation computes with float64, or sums in it, and rounds as torch does: to
float32, then to the type of its result. Tensors are small, so what counts is that no row takes long to begin.

An operation that is not for this interpreter, or not now (equal candidates of a top-k, long attention), stops it: the
caller runs it and goes on behind.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from alphaq.runtime.kernels import multiply
from alphaq.simd.codes import (
    as_brain_bits,
    as_half_bits,
    brains_at,
    half_at,
    halves_at,
    of_brain_bits,
    pointer,
)
from alphaq.simd.vectors import LANES, fma, kernel, lane_sum, load, splat, store

# Places in a row.
OP, EXTENTS, TENSORS, OWN = 0, 1, 5, 29
ADDRESS, KIND, STRIDES = range(3)  # of a tensor, which takes TENSOR places
TENSOR, ROW = 6, 40
FLOAT32, BFLOAT16, FLOAT16, INT64, BOOL = range(5)

OUTSIDE, EMBED, PACKED, DENSE, APPEND, ATTEND, SUM, MEAN, SOFTMAX, TOP = range(10)
FIRST_PLAIN = 10  # from here on one number at a time
(COPY, NEGATE, SILU, SIGMOID, RSQRT, EXP, COS, SIN, TANH, RELU, GELU, GELU_TANH, SQUARE, SOFTPLUS, SQRT) = range(10, 25)
(ADD, SUBTRACT, MULTIPLY, DIVIDE, NE, EQ, LT, LE, GT, GE, MAXIMUM, MINIMUM) = range(25, 37)
CLAMP, MASK, WHERE = range(37, 40)
LONG = 1 << 22  # products of an attention from which torch's threads are worth asking
MANY = 1 << 30
MOST_TOKENS = 64  # lines that one token makes, one for each of its experts; more are not few


@kernel
def _read(address, kind, stride, count, into):
    """Numbers at an address to float64."""
    extent = 1 + (count - 1) * stride
    if kind == FLOAT32:
        floats = carray(pointer(address), (extent,), np.float32)
        if stride == 1:
            for at in range(count):
                into[at] = floats[at]
        else:
            for at in range(count):
                into[at] = floats[at * stride]
    elif kind == BFLOAT16:
        bits = carray(pointer(address), (extent,), np.uint16)
        if stride == 1:  # by vectors
            for at in range(count):
                into[at] = of_brain_bits(bits[at])
        else:
            for at in range(count):
                into[at] = of_brain_bits(bits[at * stride])
    elif kind == FLOAT16:
        for at in range(count):
            into[at] = half_at(address + 2 * at * stride)
    elif kind == INT64:
        wholes = carray(pointer(address), (extent,), np.int64)
        for at in range(count):
            into[at] = wholes[at * stride]
    else:
        truths = carray(pointer(address), (extent,), np.uint8)
        for at in range(count):
            into[at] = truths[at * stride]


@kernel
def _write(values, count, address, kind, stride):
    """float64 to what lies at an address, rounded to float32 before anything narrower."""
    extent = 1 + (count - 1) * stride
    if kind == FLOAT32:
        floats = carray(pointer(address), (extent,), np.float32)
        if stride == 1:
            for at in range(count):
                floats[at] = values[at]
        else:
            for at in range(count):
                floats[at * stride] = values[at]
    elif kind == BFLOAT16:
        narrow = carray(pointer(address), (extent,), np.uint16)
        if stride == 1:
            for at in range(count):
                narrow[at] = as_brain_bits(np.float32(values[at]))
        else:
            for at in range(count):
                narrow[at * stride] = as_brain_bits(np.float32(values[at]))
    elif kind == FLOAT16:
        narrow = carray(pointer(address), (extent,), np.uint16)
        for at in range(count):
            narrow[at * stride] = as_half_bits(np.float32(values[at]))
    elif kind == INT64:
        wholes = carray(pointer(address), (extent,), np.int64)
        for at in range(count):
            wholes[at * stride] = np.int64(values[at])
    else:
        truths = carray(pointer(address), (extent,), np.uint8)
        for at in range(count):
            truths[at * stride] = values[at] != 0


@kernel
def _unary(op, values, count):
    """One operation on each of the values, in place."""
    if op == NEGATE:
        for at in range(count):
            values[at] = -values[at]
    elif op == SILU:
        for at in range(count):
            values[at] = values[at] / (1.0 + math.exp(-values[at]))
    elif op == SIGMOID:
        for at in range(count):
            values[at] = 1.0 / (1.0 + math.exp(-values[at]))
    elif op == RSQRT:
        for at in range(count):
            values[at] = 1.0 / math.sqrt(values[at])
    elif op == SQRT:
        for at in range(count):
            values[at] = math.sqrt(values[at])
    elif op == EXP:
        for at in range(count):
            values[at] = math.exp(values[at])
    elif op == COS:
        for at in range(count):
            values[at] = math.cos(values[at])
    elif op == SIN:
        for at in range(count):
            values[at] = math.sin(values[at])
    elif op == TANH:
        for at in range(count):
            values[at] = math.tanh(values[at])
    elif op == RELU:
        for at in range(count):
            values[at] = values[at] if not values[at] < 0.0 else 0.0
    elif op == SQUARE:
        for at in range(count):
            values[at] = values[at] * values[at]
    elif op == GELU:
        for at in range(count):
            values[at] = 0.5 * values[at] * (1.0 + math.erf(values[at] * 0.7071067811865476))
    elif op == GELU_TANH:
        for at in range(count):
            inner = 0.7978845608028654 * (values[at] + 0.044715 * values[at] ** 3)
            values[at] = 0.5 * values[at] * (1.0 + math.tanh(inner))
    elif op == SOFTPLUS:
        for at in range(count):
            values[at] = math.log1p(math.exp(values[at])) if values[at] <= 20.0 else values[at]


@kernel
def _binary(op, left, right, count):
    """One operation on pairs of values, into the left ones."""
    if op == ADD:
        for at in range(count):
            left[at] = left[at] + right[at]
    elif op == SUBTRACT:
        for at in range(count):
            left[at] = left[at] - right[at]
    elif op == MULTIPLY:
        for at in range(count):
            left[at] = left[at] * right[at]
    elif op == DIVIDE:
        for at in range(count):
            left[at] = left[at] / right[at]
    elif op == NE:
        for at in range(count):
            left[at] = left[at] != right[at]
    elif op == EQ:
        for at in range(count):
            left[at] = left[at] == right[at]
    elif op == LT:
        for at in range(count):
            left[at] = left[at] < right[at]
    elif op == LE:
        for at in range(count):
            left[at] = left[at] <= right[at]
    elif op == GT:
        for at in range(count):
            left[at] = left[at] > right[at]
    elif op == GE:
        for at in range(count):
            left[at] = left[at] >= right[at]
    elif op == MAXIMUM:
        for at in range(count):
            left[at] = right[at] if right[at] > left[at] or right[at] != right[at] else left[at]
    elif op == MINIMUM:
        for at in range(count):
            left[at] = right[at] if right[at] < left[at] or right[at] != right[at] else left[at]


@kernel
def _place(row, tensor, first, second, third):
    """Address of a line of a tensor, along the last axis."""
    at = TENSORS + TENSOR * tensor
    steps = first * row[at + STRIDES] + second * row[at + STRIDES + 1] + third * row[at + STRIDES + 2]
    return row[at + ADDRESS] + steps * _item(row[at + KIND])


@kernel
def _item(kind):
    """Bytes of a number."""
    if kind == FLOAT32:
        return 4
    if kind == INT64:
        return 8
    return 1 if kind == BOOL else 2


@kernel
def _kind(row, tensor):
    return row[TENSORS + TENSOR * tensor + KIND]


@kernel
def _stride(row, tensor):
    """Of the last axis."""
    return row[TENSORS + TENSOR * tensor + STRIDES + 3]


@kernel
def _fetch(row, tensor, first, second, third, number, into):
    """A line of an operand; without one the number."""
    count = row[EXTENTS + 3]
    if row[TENSORS + TENSOR * tensor + ADDRESS]:
        place = _place(row, tensor, first, second, third)
        _read(place, _kind(row, tensor), _stride(row, tensor), count, into)
    else:
        into[:count] = number


@kernel
def _plain(row, numbers, left, right, other):
    """Operations on one number at a time."""
    op, count = row[OP], row[EXTENTS + 3]
    for first in range(row[EXTENTS]):
        for second in range(row[EXTENTS + 1]):
            for third in range(row[EXTENTS + 2]):
                _fetch(row, 1, first, second, third, numbers[0], left)
                if op >= ADD:
                    _fetch(row, 2, first, second, third, numbers[1], right)
                if op < ADD:
                    _unary(op, left, count)
                elif op < CLAMP:
                    _binary(op, left, right, count)
                elif op == CLAMP:
                    for at in range(count):
                        left[at] = min(max(left[at], numbers[2]), numbers[3]) if left[at] == left[at] else left[at]
                elif op == MASK:  # of the left ones a number where the right ones are true
                    for at in range(count):
                        left[at] = numbers[2] if right[at] != 0.0 else left[at]
                else:
                    _fetch(row, 3, first, second, third, numbers[2], other)
                    for at in range(count):
                        left[at] = right[at] if left[at] != 0.0 else other[at]
                _write(left, count, _place(row, 0, first, second, third), _kind(row, 0), _stride(row, 0))


@kernel
def _sum(row, left, right):
    """Sums, or means, along an axis of OWN numbers a stride apart."""
    count, length, stride = row[EXTENTS + 3], row[OWN], row[OWN + 1]
    kind = _kind(row, 1)
    share = 1.0 / length if row[OP] == MEAN else 1.0
    for first in range(row[EXTENTS]):
        for second in range(row[EXTENTS + 1]):
            for third in range(row[EXTENTS + 2]):
                source = _place(row, 1, first, second, third)
                if count == 1:
                    _read(source, kind, stride, length, right)
                    total = 0.0
                    for at in range(length):
                        total += right[at]
                    left[0] = total
                else:
                    left[:count] = 0.0
                    for part in range(length):
                        _read(source + part * stride * _item(kind), kind, _stride(row, 1), count, right)
                        for at in range(count):
                            left[at] += right[at]
                for at in range(count):
                    left[at] = left[at] * share
                _write(left, count, _place(row, 0, first, second, third), _kind(row, 0), _stride(row, 0))


@kernel
def _softmax(row, left):
    count = row[EXTENTS + 3]
    for first in range(row[EXTENTS]):
        for second in range(row[EXTENTS + 1]):
            for third in range(row[EXTENTS + 2]):
                _read(_place(row, 1, first, second, third), _kind(row, 1), _stride(row, 1), count, left)
                _exponents(left, count)
                _write(left, count, _place(row, 0, first, second, third), _kind(row, 0), _stride(row, 0))


@kernel
def _exponents(values, count):
    """exp(v − max v) / Σ, in place."""
    largest = values[0]
    for at in range(count):
        largest = max(largest, values[at])
    total = 0.0
    for at in range(count):
        values[at] = math.exp(values[at] - largest)
        total += values[at]
    for at in range(count):
        values[at] = values[at] / total


@kernel
def _top(row, left, right):
    """The largest of each line, in order; returns whether there are some that order does not tell apart."""
    count, chosen = row[EXTENTS + 3], row[OWN]
    for first in range(row[EXTENTS]):
        for second in range(row[EXTENTS + 1]):
            for third in range(row[EXTENTS + 2]):
                _read(_place(row, 1, first, second, third), _kind(row, 1), _stride(row, 1), count, left)
                for number in range(chosen):
                    best = 0
                    for at in range(1, count):
                        if left[at] > left[best]:
                            best = at
                    alike = 0
                    for at in range(count):
                        alike += left[at] == left[best]
                    if alike != 1 or not left[best] > -np.inf:
                        return True
                    right[0] = left[best]
                    place = _place(row, 0, first, second, third)
                    _write(right, 1, place + number * _stride(row, 0) * _item(_kind(row, 0)), _kind(row, 0), 1)
                    right[0] = best
                    place = _place(row, 2, first, second, third)
                    _write(right, 1, place + number * _stride(row, 2) * 8, INT64, 1)
                    left[best] = -np.inf
    return False


@kernel
def _embed(row, left):
    """A line of a table by the number at an address; returns whether there is none."""
    number = carray(pointer(row[OWN]), (1,), np.int64)[0]
    if number < 0 or number >= row[OWN + 1]:
        return True
    kind = _kind(row, 1)
    source = row[TENSORS + TENSOR + ADDRESS] + number * row[OWN + 2] * _item(kind)
    _read(source, kind, _stride(row, 1), row[EXTENTS + 3], left)
    _write(left, row[EXTENTS + 3], row[TENSORS + ADDRESS], _kind(row, 0), _stride(row, 0))
    return False


@kernel
def _packed(row, sample, left, right, parallel, function, threads):
    """Products with packed matrices, a bias added; returns whether some are left to do."""
    tokens, columns, rows, pairs = row[OWN], row[OWN + 1], row[OWN + 5], row[OWN + 8]
    inputs = carray(pointer(row[TENSORS + TENSOR + ADDRESS]), (tokens * columns,), sample.dtype)
    codings = carray(pointer(row[OWN + 2]), (row[OWN + 3], row[OWN + 4], 4), np.int64)
    experts = carray(pointer(row[OWN + 6]), (pairs,), np.int64)
    chosen = carray(pointer(row[OWN + 7]), (pairs,), np.int64)
    width = row[OWN + 3] * rows
    out = np.empty((pairs, width), np.float32)
    exact = _kind(row, 1) == FLOAT32
    if multiply(
        inputs, columns, codings, rows, experts, chosen, MANY, MANY, False, exact, out, parallel, function, threads
    ):
        return True
    target, kind = row[TENSORS + ADDRESS], _kind(row, 0)
    bias = row[TENSORS + 3 * TENSOR + ADDRESS]
    for pair in range(pairs):
        for begin in range(0, width, left.size):
            count = min(left.size, width - begin)
            left[:count] = out[pair, begin : begin + count]
            if bias:
                _read(bias + begin * _item(kind), kind, 1, count, right)
                for at in range(count):
                    left[at] += right[at]
            _write(left, count, target + (pair * width + begin) * _item(kind), kind, 1)
    return False


@kernel
def _lanes_at(address, kind):
    """Sixteen numbers at an address as float32."""
    if kind == BFLOAT16:
        return brains_at(address)
    if kind == FLOAT16:
        return halves_at(address)
    return load(carray(pointer(address), (LANES,), np.float32), 0)


@kernel
def _dot(address, kind, values, count):
    """Sum of products of numbers at an address with float32 values, whose number is a multiple of 16."""
    total = splat(np.float32(0))
    step = LANES * _item(kind)
    for at in range(0, count, LANES):
        total = fma(_lanes_at(address, kind), load(values, at), total)
        address += step
    return lane_sum(total)


@kernel
def _narrow(address, kind, count, wide):
    """Numbers at an address as float32."""
    _read(address, kind, 1, count, wide)
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
                _read(bias + 4 * begin, FLOAT32, 1, count, right)
                for at in range(count):
                    left[at] += right[at]
            _write(left, count, row[TENSORS + ADDRESS] + 4 * (token * rows + begin), FLOAT32, 1)


@kernel
def _append(row, slots, length, left):
    """A token's keys or values behind those that a cache has; a slot holds its address and the tokens it has room for."""
    heads, width, kind = row[EXTENTS + 2], row[EXTENTS + 3], _kind(row, 1)
    address, capacity = slots[row[OWN], 0], slots[row[OWN], 1]
    for head in range(heads):
        _read(_place(row, 1, 0, 0, head), kind, _stride(row, 1), width, left)
        _write(left, width, address + (head * capacity + length) * width * _item(kind), kind, 1)


@kernel
def _attend(row, slots, length, scale, wide):
    """Attention of every query to all keys up to its own; returns whether torch is to do it."""
    query_heads, queries, width, value_width = row[OWN + 2], row[OWN + 3], row[OWN + 4], row[OWN + 5]
    kind, item = _kind(row, 1), _item(_kind(row, 1))
    heads, known = row[OWN + 6], length + 1
    if query_heads * queries * known * (width + value_width) > LONG:
        return True
    keys, key_room = slots[row[OWN], 0], slots[row[OWN], 1]
    entries, value_room = slots[row[OWN + 1], 0], slots[row[OWN + 1], 1]
    scores, sums = np.empty(known, np.float64), np.empty(value_width, np.float32)
    result = np.empty(value_width, np.float64)
    for number in range(query_heads * queries):
        head, query = number // queries, number % queries
        values = np.empty(width, np.float32)
        _read(_place(row, 1, 0, head, query), kind, _stride(row, 1), width, wide)
        for at in range(width):
            values[at] = wide[at]
        source = head * heads // query_heads
        for token in range(known):
            scores[token] = scale * _dot(keys + (source * key_room + token) * width * item, kind, values, width)
        _exponents(scores, known)
        for at in range(0, value_width, LANES):
            total = splat(np.float32(0))
            place = entries + (source * value_room * value_width + at) * item
            for token in range(known):
                total = fma(_lanes_at(place, kind), splat(np.float32(scores[token])), total)
                place += value_width * item
            store(sums, at, total)
        for at in range(value_width):
            result[at] = sums[at]
        _write(result, value_width, _place(row, 0, 0, head, query), _kind(row, 0), _stride(row, 0))
    return False


@kernel
def run(rows, numbers, slots, length, begin, room, sample, parallel, function, threads):
    """Run a step's rows from `begin` on; returns the first that is not for here, or how many there are.

    rows: int64 [n, ROW]. numbers: float64 [n, 4]. slots: int64 [n, 2], where keys and values of `length` tokens are
    and how many have room. room: the longest line. sample: empty, of the type of packed products' inputs. parallel,
    function, threads: see `kernels.multiply`.
    """
    left, right, other = np.empty(room), np.empty(room), np.empty(room)
    for number in range(begin, len(rows)):
        row = rows[number]
        op, stop = row[OP], False
        if op >= FIRST_PLAIN:
            _plain(row, numbers[number], left, right, other)
        elif op == PACKED:
            stop = _packed(row, sample, left, right, parallel, function, threads)
        elif op == SUM or op == MEAN:
            _sum(row, left, right)
        elif op == APPEND:
            _append(row, slots, length, left)
        elif op == ATTEND:
            stop = _attend(row, slots, length, numbers[number, 0], left)
        elif op == SOFTMAX:
            _softmax(row, left)
        elif op == TOP:
            stop = _top(row, left, right)
        elif op == DENSE:
            _dense(row, left, right)
        elif op == EMBED:
            stop = _embed(row, left)
        else:
            stop = True
        if stop:
            return number
    return len(rows)
