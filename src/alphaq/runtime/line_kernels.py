"""Operations of a step on lines of numbers: one at a time, sums, softmax and the largest.

Lines are read to float64 and written rounded as torch rounds: to float32, then to the type of the result.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from alphaq.simd.codes import as_brain_bits, as_half_bits, half_at, of_brain_bits, pointer
from alphaq.simd.vectors import kernel

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
def read_line(address, kind, stride, count, into):
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
def write_line(values, count, address, kind, stride):
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
def line_of(row, tensor, first, second, third):
    """Address of a line of a tensor, along the last axis."""
    at = TENSORS + TENSOR * tensor
    steps = first * row[at + STRIDES] + second * row[at + STRIDES + 1] + third * row[at + STRIDES + 2]
    return row[at + ADDRESS] + steps * item_bytes(row[at + KIND])


@kernel
def item_bytes(kind):
    """Bytes of a number."""
    if kind == FLOAT32:
        return 4
    if kind == INT64:
        return 8
    return 1 if kind == BOOL else 2


@kernel
def kind_of(row, tensor):
    return row[TENSORS + TENSOR * tensor + KIND]


@kernel
def stride_of(row, tensor):
    """Of the last axis."""
    return row[TENSORS + TENSOR * tensor + STRIDES + 3]


@kernel
def _fetch(row, tensor, first, second, third, number, into):
    """A line of an operand; without one the number."""
    count = row[EXTENTS + 3]
    if row[TENSORS + TENSOR * tensor + ADDRESS]:
        place = line_of(row, tensor, first, second, third)
        read_line(place, kind_of(row, tensor), stride_of(row, tensor), count, into)
    else:
        into[:count] = number


@kernel
def plain(row, numbers, left, right, other):
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
                write_line(left, count, line_of(row, 0, first, second, third), kind_of(row, 0), stride_of(row, 0))


@kernel
def sums(row, left, right):
    """Sums, or means, along an axis of OWN numbers a stride apart."""
    count, length, stride = row[EXTENTS + 3], row[OWN], row[OWN + 1]
    kind = kind_of(row, 1)
    share = 1.0 / length if row[OP] == MEAN else 1.0
    for first in range(row[EXTENTS]):
        for second in range(row[EXTENTS + 1]):
            for third in range(row[EXTENTS + 2]):
                source = line_of(row, 1, first, second, third)
                if count == 1:
                    read_line(source, kind, stride, length, right)
                    total = 0.0
                    for at in range(length):
                        total += right[at]
                    left[0] = total
                else:
                    left[:count] = 0.0
                    for part in range(length):
                        read_line(source + part * stride * item_bytes(kind), kind, stride_of(row, 1), count, right)
                        for at in range(count):
                            left[at] += right[at]
                for at in range(count):
                    left[at] = left[at] * share
                write_line(left, count, line_of(row, 0, first, second, third), kind_of(row, 0), stride_of(row, 0))


@kernel
def softmax(row, left):
    count = row[EXTENTS + 3]
    for first in range(row[EXTENTS]):
        for second in range(row[EXTENTS + 1]):
            for third in range(row[EXTENTS + 2]):
                read_line(line_of(row, 1, first, second, third), kind_of(row, 1), stride_of(row, 1), count, left)
                exponents(left, count)
                write_line(left, count, line_of(row, 0, first, second, third), kind_of(row, 0), stride_of(row, 0))


@kernel
def exponents(values, count):
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
def largest(row, left, right):
    """The largest of each line, in order; returns whether there are some that order does not tell apart."""
    count, chosen = row[EXTENTS + 3], row[OWN]
    for first in range(row[EXTENTS]):
        for second in range(row[EXTENTS + 1]):
            for third in range(row[EXTENTS + 2]):
                read_line(line_of(row, 1, first, second, third), kind_of(row, 1), stride_of(row, 1), count, left)
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
                    place = line_of(row, 0, first, second, third)
                    write_line(
                        right, 1, place + number * stride_of(row, 0) * item_bytes(kind_of(row, 0)), kind_of(row, 0), 1
                    )
                    right[0] = best
                    place = line_of(row, 2, first, second, third)
                    write_line(right, 1, place + number * stride_of(row, 2) * 8, INT64, 1)
                    left[best] = -np.inf
    return False
