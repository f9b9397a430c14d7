"""Operations of a step on lines of numbers: one at a time, sums, softmax and the largest.

Lines are read to float64 and written rounded as torch rounds: to float32, then to the type of the result.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from alphaq.runtime.lane_kernels import by_lanes, whole_lanes
from alphaq.runtime.row_kernels import (
    ADD,
    ADDRESS,
    BFLOAT16,
    CLAMP,
    COS,
    DIVIDE,
    EQ,
    EXP,
    EXTENTS,
    FLOAT16,
    FLOAT32,
    GE,
    GELU,
    GELU_TANH,
    GT,
    INT64,
    LE,
    LT,
    MASK,
    MAXIMUM,
    MEAN,
    MINIMUM,
    MULTIPLY,
    NE,
    NEGATE,
    OP,
    OWN,
    RELU,
    RSQRT,
    SIGMOID,
    SILU,
    SIN,
    SOFTPLUS,
    SQRT,
    SQUARE,
    SUBTRACT,
    TANH,
    TENSOR,
    TENSORS,
    item_bytes,
    kind_of,
    line_of,
    stride_of,
)
from alphaq.simd.codes import as_brain_bits, as_half_bits, half_at, of_brain_bits, pointer
from alphaq.simd.lanes import times_power
from alphaq.simd.vectors import kernel


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
def exponential(value):
    """exp of a float64 to some units of its last place, without a branch, so that a loop of them becomes vectors.

    2^n · exp(r) with |r| ≤ ln 2 / 2 and a Taylor polynomial. What float32 cannot hold may be any such number.
    """
    held = min(max(value, -700.0), 700.0)
    shifted = held * 1.4426950408889634 + 6755399441055744.0  # 1.5 · 2^52, beside which no fraction has room
    whole = shifted - 6755399441055744.0
    rest = held - whole * 0.6931471803691238 - whole * 1.9082149292705877e-10
    result = 2.08767569878681e-09
    result = result * rest + 2.505210838544172e-08
    result = result * rest + 2.755731922398589e-07
    result = result * rest + 2.7557319223985893e-06
    result = result * rest + 2.48015873015873e-05
    result = result * rest + 0.0001984126984126984
    result = result * rest + 0.001388888888888889
    result = result * rest + 0.008333333333333333
    result = result * rest + 0.041666666666666664
    result = result * rest + 0.16666666666666666
    result = result * rest + 0.5
    result = result * rest + 1.0
    result = result * rest + 1.0
    result = times_power(result, shifted)
    result = np.inf if value > 709.0 else result  # −inf · sigmoid(−inf) is no number, as torch has it
    return result if value == value else value


@kernel
def _unary(op, values, count):
    """One operation on each of the values, in place."""
    if op == NEGATE:
        for at in range(count):
            values[at] = -values[at]
    elif op == SILU:
        for at in range(count):
            values[at] = values[at] / (1.0 + exponential(-values[at]))
    elif op == SIGMOID:
        for at in range(count):
            values[at] = 1.0 / (1.0 + exponential(-values[at]))
    elif op == RSQRT:
        for at in range(count):
            values[at] = 1.0 / math.sqrt(values[at])
    elif op == SQRT:
        for at in range(count):
            values[at] = math.sqrt(values[at])
    elif op == EXP:
        for at in range(count):
            values[at] = exponential(values[at])
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
def _fetch(row, tensor, first, second, third, begin, number, into):
    """A line of an operand from some place on; without one the number."""
    count, kind, stride = row[EXTENTS + 3] - begin, kind_of(row, tensor), stride_of(row, tensor)
    if row[TENSORS + TENSOR * tensor + ADDRESS]:
        place = line_of(row, tensor, first, second, third) + begin * stride * item_bytes(kind)
        read_line(place, kind, stride, count, into)
    else:
        into[:count] = number


@kernel
def plain(row, numbers, left, right, other):
    """Operations on one number at a time."""
    whole = whole_lanes(row)
    for first in range(row[EXTENTS]):
        for second in range(row[EXTENTS + 1]):
            for third in range(row[EXTENTS + 2]):
                if whole:
                    by_lanes(row, numbers, first, second, third, whole)
                if whole < row[EXTENTS + 3]:
                    _by_numbers(row, numbers, first, second, third, whole, left, right, other)


@kernel
def _by_numbers(row, numbers, first, second, third, begin, left, right, other):
    """A line of a plain operation from some place on."""
    op, count, kind, stride = row[OP], row[EXTENTS + 3] - begin, kind_of(row, 0), stride_of(row, 0)
    _fetch(row, 1, first, second, third, begin, numbers[0], left)
    if op >= ADD:
        _fetch(row, 2, first, second, third, begin, numbers[1], right)
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
        _fetch(row, 3, first, second, third, begin, numbers[2], other)
        for at in range(count):
            left[at] = right[at] if left[at] != 0.0 else other[at]
    write_line(left, count, line_of(row, 0, first, second, third) + begin * stride * item_bytes(kind), kind, stride)


@kernel
def total_of(values, count):
    """Sum of values, every fourth by itself first, so that none waits for all before it."""
    one, two, three, four, whole = 0.0, 0.0, 0.0, 0.0, count // 4 * 4
    for at in range(0, whole, 4):
        one += values[at]
        two += values[at + 1]
        three += values[at + 2]
        four += values[at + 3]
    for at in range(whole, count):
        one += values[at]
    return (one + two) + (three + four)


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
                    left[0] = total_of(right, length)
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
    for at in range(count):
        values[at] = exponential(values[at] - largest)
    total = total_of(values, count)
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
